"""The generator is the worker's engine without a queue, and is whole after Ctrl-C."""

from __future__ import annotations

import signal

import pytest
from tests.tiny_models import make_tiny_model_folder

from shoal import InvalidRequest, SamplingParams
from shoal.wire import GenerationRequest
from shoal_worker import Generator

PROMPTS = ["the cat", "a dog sat on the mat and", "it", "one two three four five six"] * 3


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Generator:
    folder = make_tiny_model_folder(tmp_path_factory.mktemp("models") / "tiny")
    return Generator(model=str(folder), device="cpu", dtype="float32", lanes="bulk=4x64", threads=1)


def texts(generator: Generator) -> list[str]:
    return [result.text for result in generator.generate(PROMPTS, max_tokens=6, seed=1)]


def test_sampling_is_given_as_one_value_or_as_fields(generator: Generator) -> None:
    sampling = SamplingParams(max_tokens=6, seed=1)

    as_value = generator.generate(PROMPTS, sampling)

    assert [result.text for result in as_value] == texts(generator)
    assert [result.prompt for result in as_value] == PROMPTS


def test_requests_and_token_ids_are_prompts_too(generator: Generator) -> None:
    request = GenerationRequest(
        prompt="it", id="mine", sampling=SamplingParams(max_tokens=3, temperature=0)
    )

    first, second = generator.generate([request, [5, 6, 7]], max_tokens=2)

    assert (first.id, first.usage.completion_tokens) == ("mine", 3)
    assert (second.prompt, second.usage.prompt_tokens) == ([5, 6, 7], 3)


def test_one_text_is_not_taken_for_a_list_of_letters(generator: Generator) -> None:
    with pytest.raises(InvalidRequest, match="put it in a list"):
        generator.generate("the cat")


def test_ctrl_c_leaves_a_generator_that_gives_the_same_texts(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = texts(generator)
    engine = generator._serving._loop._engine
    whole, num_steps = engine.decode, 0

    def decode(step: object, *meanwhile: object) -> object:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 4:
            signal.raise_signal(signal.SIGINT)
        return whole(step, *meanwhile)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "decode", decode)
    with pytest.raises(KeyboardInterrupt):
        texts(generator)

    assert num_steps == 4
    assert texts(generator) == before
