"""Verbs' arguments as jobs, and an input of any length in groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import InvalidRequest
from shoal.jobs import MAX_PACK_REQUESTS
from shoal.submission import RequestGroups, packed_jobs, single_job
from shoal.wire import GenerationRequest


def requests(number: int) -> Iterator[GenerationRequest]:
    return (GenerationRequest(prompt=f"p{i}") for i in range(number))


@given(st.integers(1, 10_000))
def test_a_window_holds_eight_groups_or_groups_of_one(max_in_flight: int) -> None:
    size = RequestGroups(requests(0), max_in_flight).size

    assert 1 <= size <= MAX_PACK_REQUESTS
    assert size == 1 or 8 * size <= max_in_flight


@given(st.integers(0, 60), st.integers(1, 40))
def test_groups_are_the_input_in_order_and_never_overfill_the_window(
    num_requests: int, max_in_flight: int
) -> None:
    groups = RequestGroups(requests(num_requests), max_in_flight)
    in_flight: list[GenerationRequest] = []
    done: list[GenerationRequest] = []
    while True:
        while group := groups.take(len(in_flight)):
            in_flight += group
            assert len(in_flight) <= max_in_flight
        if not in_flight:
            break
        done.append(in_flight.pop(0))

    assert done == list(requests(num_requests))


def test_a_single_job_takes_its_id_from_its_key_and_its_fields_from_the_verb() -> None:
    first, second = (
        single_job(
            "p",
            None,
            {"max_tokens": 3},
            queue="q",
            result_ttl_s=60,
            idempotency_key="k",
            model="m",
            deadline=None,
        )
        for _ in range(2)
    )

    assert first.job_id == second.job_id
    assert first.requests[0].sampling.max_tokens == 3
    assert (first.requests[0].model, first.queue) == ("m", "q")


def test_many_requests_are_packed_or_all_refused() -> None:
    jobs = packed_jobs([*requests(4), "text"], queue="q", result_ttl_s=60, requests_per_job=2)

    assert [len(job.requests) for job in jobs] == [2, 2, 1]
    with pytest.raises(InvalidRequest, match="prompt is empty"):
        packed_jobs(["a", ""], queue="q", result_ttl_s=60)
