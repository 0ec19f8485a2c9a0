"""The engine's tokens are the model's own, at declared shapes, whatever happens to slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.serving import (
    TABLE,
    decode,
    loaded_model,
    mixed_sequences,
    prefill,
    random_prompt,
    sequence,
    sequences,
    serve,
)
from tests.tiny_models import KINDS, Kind, tiny_config, tiny_model
from torch import nn
from transformers import PreTrainedModel

from shoal.errors import ModelError
from shoal_worker.engine import Engine
from shoal_worker.engine.options import EngineOptions
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.scheduler import Row
from shoal_worker.sequence import Sequence

LANE = LaneSpec("bulk", 4, 128)


def generated_alone(model: PreTrainedModel, one: Sequence) -> list[int]:
    """What transformers' own generate makes of one prompt."""
    prompt = torch.tensor([one.prompt_token_ids])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=one.sampling.max_tokens,
            do_sample=False,
            pad_token_id=0,
        )
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("options", [{}, {"kernels": False}], ids=["native", "torch alone"])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_tokens_equal_generate_of_each_prompt_alone(
    kind: Kind, options: dict[str, Any]
) -> None:
    engine = Engine(loaded_model(kind), TABLE, EngineOptions(**options))
    served = sequences()

    serve(engine, served)

    model = tiny_model(tiny_config(kind))
    for one in served:
        assert one.output_token_ids == generated_alone(model, one)
    assert len({token for one in served for token in one.output_token_ids}) > 20


def test_greedy_logprobs_agree_with_the_model_s_forward_over_the_whole_text() -> None:
    served = sequences((20,), logprobs=2, max_tokens=8)
    serve(Engine(loaded_model(), TABLE), served)

    (one,) = served
    text = torch.tensor([[*one.prompt_token_ids, *one.output_token_ids]])
    with torch.inference_mode():
        logs = tiny_model(tiny_config("gpt2"))(text).logits[0, 19:-1].log_softmax(-1)
    for position, report in enumerate(one.output_logprobs):
        token_id = one.output_token_ids[position]
        assert report.chosen == pytest.approx(logs[position, token_id].item(), abs=1e-4)
        assert report.top[0] == (token_id, report.chosen)
        assert len(report.top) == 2


def test_a_slot_ended_from_outside_can_be_refilled_at_once() -> None:
    loaded = loaded_model()
    engine = Engine(loaded, LaneTable([LANE]))
    staying = sequence(random_prompt(1, 9), max_tokens=30)
    cancelled = sequence(random_prompt(2, 50), max_tokens=30)
    prefill(engine, LANE, Row(0, staying), Row(1, cancelled))
    decode(engine, LANE, Row(0, staying), Row(1, cancelled), num_steps=4)

    refill = sequence(random_prompt(3, 4), max_tokens=30)
    prefill(engine, LANE, Row(1, refill))
    decode(engine, LANE, Row(0, staying), Row(1, refill), num_steps=10)

    model = tiny_model(tiny_config("gpt2"))
    for one in (staying, refill):
        expected = generated_alone(model, one)
        assert one.output_token_ids == expected[: len(one.output_token_ids)]


def test_a_running_slot_that_a_step_leaves_out_goes_on_where_it_was() -> None:
    engine = Engine(loaded_model(), LaneTable([LANE]))
    pausing = sequence(random_prompt(1, 9), max_tokens=30, temperature=1.0, frequency_penalty=0.5)
    other = sequence(random_prompt(2, 12), max_tokens=30)
    prefill(engine, LANE, Row(0, pausing), Row(1, other))
    decode(engine, LANE, Row(0, pausing), Row(1, other), num_steps=3)
    decode(engine, LANE, Row(1, other), num_steps=5)
    decode(engine, LANE, Row(0, pausing), num_steps=6)

    alone = sequence(random_prompt(1, 9), max_tokens=30, temperature=1.0, frequency_penalty=0.5)
    engine = Engine(loaded_model(), LaneTable([LANE]))
    prefill(engine, LANE, Row(2, alone))
    decode(engine, LANE, Row(2, alone), num_steps=9)
    assert pausing.output_token_ids == alone.output_token_ids


def test_a_slot_that_holds_another_sequence_is_not_decoded() -> None:
    engine = Engine(loaded_model(), LaneTable([LANE]))
    prefill(engine, LANE, Row(0, sequence([1, 2], max_tokens=5)))

    with pytest.raises(AssertionError, match="another sequence"):
        decode(engine, LANE, Row(0, sequence([1, 2], max_tokens=5)))


def test_samples_of_one_request_differ_and_each_comes_again() -> None:
    def sample(number: int) -> list[int]:
        one = sequence([5, 6, 7], max_tokens=12, temperature=1.0, seed=77)
        one.key = one.key._replace(sample=number)
        serve(Engine(loaded_model(), TABLE), [one])
        return one.output_token_ids

    assert sample(0) != sample(1)
    assert sample(0) == sample(0)


def test_the_model_only_ever_runs_at_declared_shapes() -> None:
    loaded = loaded_model()
    engine = Engine(loaded, TABLE)
    shapes: set[tuple[int, ...]] = set()

    def record(_: nn.Module, __: Any, inputs: dict[str, Any]) -> None:
        shapes.add(tuple(inputs["input_ids"].shape))

    with loaded.model.register_forward_pre_hook(record, with_kwargs=True):
        serve(engine, sequences())

    declared = {(spec.slots, 1) for spec in TABLE.lanes}
    for spec in TABLE.lanes:
        declared |= {(bucket.rows, bucket.length) for bucket in spec.buckets()}
    assert shapes <= declared


def test_a_prefill_makes_the_logits_of_one_position_a_row() -> None:
    loaded = loaded_model()
    engine = Engine(loaded, TABLE)
    lengths: set[int] = set()
    head = loaded.model.get_output_embeddings()

    with head.register_forward_hook(lambda _, __, logits: lengths.add(logits.shape[1])):
        serve(engine, sequences((40, 3)))

    assert lengths == {1}


def test_warming_up_runs_every_shape_and_leaves_no_trace() -> None:
    loaded = loaded_model()
    warm = Engine(loaded, TABLE)
    shapes: set[tuple[int, ...]] = set()
    with loaded.model.register_forward_pre_hook(
        lambda _, __, inputs: shapes.add(tuple(inputs["input_ids"].shape)), with_kwargs=True
    ):
        warm.warm_up()
    num_shapes = sum(1 + len(spec.buckets()) for spec in TABLE.lanes)
    after, cold = mixed_sequences(), mixed_sequences()

    serve(warm, after)
    serve(Engine(loaded, TABLE), cold)

    assert len(shapes) == num_shapes
    for one, other in zip(after, cold, strict=True):
        assert one.output_logprobs == other.output_logprobs


def test_warming_up_says_when_a_row_s_place_makes_a_difference(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loaded = loaded_model()
    engine = Engine(loaded, LaneTable([LANE]))
    engine.warm_up()
    assert not caplog.records

    def favour_the_last_row(_: nn.Module, __: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.cat([logits[:-1], logits[-1:] * 1.0001])

    head = loaded.model.get_output_embeddings()
    with head.register_forward_hook(favour_the_last_row):
        engine.warm_up()

    assert "lane bulk-4x128 gives equal rows unequal results" in caplog.text


def test_lanes_that_do_not_fit_are_refused_with_both_sizes_and_the_setting() -> None:
    table = LaneTable([LaneSpec("bulk", 10**9, 128)])

    with pytest.raises(ModelError, match=r"need \d+\.\d GiB .* --lanes or SHOAL_LANES"):
        Engine(loaded_model(), table)


def test_lanes_that_torch_cannot_allocate_are_refused_alike(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("shoal_worker.engine.engine.available_bytes", lambda _: None)

    with pytest.raises(ModelError, match="SHOAL_LANES"):
        Engine(loaded_model(), LaneTable([LaneSpec("bulk", 10**12, 128)]))


def test_the_fingerprint_names_model_and_lanes() -> None:
    loaded = loaded_model()
    engine = Engine(loaded, TABLE)

    assert engine.fingerprint == Engine(loaded, TABLE).fingerprint
    assert engine.fingerprint != loaded.fingerprint
    assert engine.fingerprint != Engine(loaded, LaneTable([LANE])).fingerprint
