"""Rows into jobs: order and bounds, and the gaps that end a job."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.bulk.packing import (
    MAX_JOB_NEW_TOKENS,
    MAX_JOB_SEQUENCES,
    PendingRow,
    job_sequences,
    pack_rows,
)
from shoal.bulk.rows import InputRow, Place
from shoal.jobs import MAX_PACK_BYTES, prompt_bytes
from shoal.wire import GenerationRequest, SamplingParams


def pending(position: int, prompt: str = "p", **sampling: Any) -> PendingRow:
    request = GenerationRequest(prompt=prompt, sampling=SamplingParams(**sampling))
    return PendingRow(position, InputRow(Place(position, position + 1), "r", request, {}, {}))


def sizes(rows: list[PendingRow], max_sequences: int = MAX_JOB_SEQUENCES) -> list[int]:
    return [len(group) for group in pack_rows(rows, max_sequences, skips=True)]


def test_short_rows_share_a_job_and_long_ones_do_not() -> None:
    assert sizes([pending(i, max_tokens=16) for i in range(600)]) == [256, 256, 88]
    assert sizes([pending(i, max_tokens=1_024) for i in range(9)]) == [4, 4, 1]
    assert sizes([pending(i, max_tokens=1, n=100) for i in range(5)]) == [2, 2, 1]
    assert sizes([pending(i, "x" * 200_000) for i in range(5)]) == [2, 2, 1]


def test_a_row_over_every_bound_is_a_job_of_its_own() -> None:
    rows = [pending(0), pending(1, max_tokens=100_000), pending(2)]

    assert sizes(rows) == [1, 1, 1]


@given(
    st.lists(
        st.tuples(st.integers(1, 3_000), st.integers(1, 4), st.integers(1, 1_000)), max_size=60
    )
)
def test_no_row_is_lost_or_moved_and_no_job_of_several_passes_a_bound(
    shapes: list[tuple[int, int, int]],
) -> None:
    rows = [
        pending(i, "x" * length, max_tokens=tokens, n=n)
        for i, (tokens, n, length) in enumerate(shapes)
    ]

    groups = list(pack_rows(rows, 8, skips=True))

    assert [row for group in groups for row in group] == rows
    for group in groups:
        requests = [row.row.request for row in group]
        if len(group) > 1:
            assert sum(one.sampling.n for one in requests) <= 8
            assert sum(one.sampling.n * one.sampling.max_tokens for one in requests) <= (
                MAX_JOB_NEW_TOKENS
            )
            assert sum(map(prompt_bytes, requests)) <= MAX_PACK_BYTES


def test_where_rows_may_be_missing_a_job_ends_at_a_gap() -> None:
    rows = [pending(i) for i in (3, 4, 5, 9, 10)]

    groups = pack_rows(rows, 256, skips=False)

    assert [[row.position for row in group] for group in groups] == [[3, 4, 5], [9, 10]]


@pytest.mark.parametrize(
    ("num_rows_left", "max_in_flight", "expected"),
    [(5, 2_048, 1), (160, 2_048, 10), (1_000_000, 2_048, 128), (1_000_000, 100_000, 256)],
)
def test_a_job_is_a_small_part_of_the_run_and_of_the_window(
    num_rows_left: int, max_in_flight: int, expected: int
) -> None:
    assert job_sequences(num_rows_left, max_in_flight) == expected
