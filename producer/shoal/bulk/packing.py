"""Rows into jobs: as many as their lengths allow. Pure.

A job costs the queue about a millisecond whatever it holds, so short rows are packed by the
hundred. What a killed worker loses is a job, and a job is answered when its last row ends, so its
tokens are bounded; its prompts and its result must be read and written in one piece, so their bytes
are too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shoal.bulk.rows import InputRow
from shoal.jobs import MAX_PACK_BYTES, prompt_bytes
from shoal.wire import GenerationRequest

MAX_JOB_SEQUENCES = 256
MAX_JOB_NEW_TOKENS = 4_096
MAX_JOB_RESULT_BYTES = 1_048_576
# A token of a result: its id, its text, and a third of both for base64.
BYTES_PER_NEW_TOKEN = 16
BYTES_PER_COMPLETION = 512
MIN_JOBS = 16  # Of a run, and of a window: with fewer, workers wait for each other's rows.


@dataclass(slots=True)
class PendingRow:
    """One row without an outcome: its position in the input, and how often it was submitted.

    Attributes:
        losses: how often its job was gone from Redis without an answer.
    """

    position: int
    row: InputRow
    attempts: int = 0
    losses: int = 0

    @property
    def num_sequences(self) -> int:
        """How much of the window it fills."""
        return self.row.request.sampling.n


def job_sequences(num_rows_left: int, max_in_flight: int) -> int:
    """Sequences a job at the most, so that a run and its window are of `MIN_JOBS` jobs or more."""
    return max(1, min(MAX_JOB_SEQUENCES, num_rows_left // MIN_JOBS, max_in_flight // MIN_JOBS))


def pack_rows(
    rows: Iterable[PendingRow], max_sequences: int, *, skips: bool
) -> Iterator[list[PendingRow]]:
    """These rows, in order, in groups of bounded size; a row over a bound is a group alone.

    Args:
        skips: whether the positions between two rows have no request; else a group ends at a gap.
    """
    group: list[PendingRow] = []
    room = _Room(max_sequences)
    for row in rows:
        is_gap = bool(group) and not skips and row.position != group[-1].position + 1
        if group and (is_gap or not room.holds(row.row.request)):
            yield group
            group, room = [], _Room(max_sequences)
        group.append(row)
        room.take(row.row.request)
    if group:
        yield group


class _Room:
    """What is left of a job's bounds."""

    def __init__(self, max_sequences: int) -> None:
        self._left = [
            max_sequences,
            MAX_JOB_NEW_TOKENS,
            MAX_PACK_BYTES,
            MAX_JOB_RESULT_BYTES,
        ]

    def holds(self, request: GenerationRequest) -> bool:
        return all(left >= size for left, size in zip(self._left, _sizes(request), strict=True))

    def take(self, request: GenerationRequest) -> None:
        self._left = [left - size for left, size in zip(self._left, _sizes(request), strict=True)]


def _sizes(request: GenerationRequest) -> tuple[int, int, int, int]:
    sampling = request.sampling
    new_tokens = sampling.n * sampling.max_tokens
    result_bytes = sampling.n * BYTES_PER_COMPLETION + new_tokens * BYTES_PER_NEW_TOKEN
    return sampling.n, new_tokens, prompt_bytes(request), result_bytes
