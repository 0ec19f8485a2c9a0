"""The workloads are what their figures say they are."""

from __future__ import annotations

from shoal.wire import MAX_REQUESTS_PER_JOB
from shoal_worker.bench.workloads import jobs, requests

VOCAB_SIZE = 50_257


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


def test_jobs_hold_as_many_requests_as_a_job_may() -> None:
    sizes = [len(job.job["requests"]) for job in jobs(requests("W1", 1500, VOCAB_SIZE))]

    assert sizes == [MAX_REQUESTS_PER_JOB, 1500 - MAX_REQUESTS_PER_JOB]
