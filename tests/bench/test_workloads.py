"""The workloads are what their figures say they are."""

from __future__ import annotations

from pathlib import Path

import pytest

from shoal.errors import InvalidRequest, ShoalError
from shoal.wire import Completion, GenerationResult, ResultError, Usage
from shoal_worker.bench.roofline import Lengths
from shoal_worker.bench.workloads import Workload, file_requests, requests

VOCAB_SIZE = 50_257


def encode(text: str) -> list[int]:
    return [len(word) for word in text.split()]


def result(made: int, error: ResultError | None = None) -> GenerationResult:
    usage = Usage(prompt_tokens=1, completion_tokens=made)
    completion = Completion(index=0, text="", token_ids=[], finish_reason="length")
    return GenerationResult(
        id="r",
        completions=[] if error else [completion],
        usage=usage,
        error=error,
        model="m",
        fingerprint="f",
    )


def test_w1_wants_64_tokens_of_prompts_of_16_to_128() -> None:
    all_requests = requests("W1", 500, VOCAB_SIZE)

    lengths = {len(request.prompt) for request in all_requests}
    assert (min(lengths), max(lengths)) == (16, 128)
    assert {request.sampling.max_tokens for request in all_requests} == {64}
    assert all_requests == requests("W1", 500, VOCAB_SIZE)


def test_w2_has_w1_s_prompts_and_lengths_of_its_own() -> None:
    first, second = requests("W1", 500, VOCAB_SIZE), requests("W2", 500, VOCAB_SIZE)

    news = [request.sampling.max_tokens for request in second]
    assert [request.prompt for request in first] == [request.prompt for request in second]
    assert (min(news), max(news)) == (8, 256)
    assert 55 < sum(news) / len(news) < 75


def test_a_file_s_rows_keep_their_sampling_and_run_to_their_last_token(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "one three"}\n'
        '{"prompt": [5, 6, 7], "max_tokens": 9, "temperature": 0, "stop": ["x"], "n": 3}\n'
        '{"prompt": "never read"}\n'
    )

    first, second = file_requests(path, 2, 40, encode)

    assert (first.prompt, first.sampling.max_tokens, first.sampling.top_k) == ([3, 5], 40, 50)
    assert (second.prompt, second.sampling.max_tokens) == ([5, 6, 7], 9)
    assert second.sampling.temperature == 0
    assert (second.sampling.stop, second.sampling.n) == ([], 1)
    assert first.sampling.ignore_eos
    assert second.sampling.ignore_eos


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "holds no prompts"),
        ('{"prompt": "a"}\n{"max_tokens": 3}\n', "line 2: prompt is missing"),
    ],
)
def test_a_file_that_is_no_workload_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)

    with pytest.raises(InvalidRequest, match=words):
        file_requests(path, None, 40, encode)


def test_a_workload_counts_its_tokens_and_has_a_first_part() -> None:
    workload = Workload("W1", requests("W1", 8, VOCAB_SIZE))

    assert workload.new_tokens == 8 * 64
    assert workload.prompt_tokens == sum(len(one.prompt) for one in workload.requests)
    assert workload.lengths[3] == Lengths(len(workload.requests[3].prompt), 64)
    assert workload.first(1 / 4).requests == workload.requests[:2]
    assert len(workload.first(1 / 100).requests) == 1


def test_a_model_too_short_for_a_workload_is_refused_with_both_numbers() -> None:
    workload = Workload("W1", requests("W1", 100, VOCAB_SIZE))

    workload.check_fits(192)
    with pytest.raises(InvalidRequest, match="of 192 tokens together; the lanes take 191"):
        workload.check_fits(191)


def test_a_completion_that_is_too_short_makes_a_run_void() -> None:
    workload = Workload("W1", requests("W1", 2, VOCAB_SIZE))

    workload.check_complete([result(64), result(64)])
    with pytest.raises(ShoalError, match="made 63 tokens of 64"):
        workload.check_complete([result(64), result(63)])
    with pytest.raises(ShoalError, match="failed: no room"):
        workload.check_complete([result(64), result(0, ResultError(code="x", message="no room"))])
