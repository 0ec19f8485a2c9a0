"""Bulk runs as others see them: how far each has come, from what it says of itself in Redis."""

from __future__ import annotations

from dataclasses import dataclass

from redis import Redis


@dataclass(frozen=True, slots=True)
class RunProgress:
    """One bulk run: input rows done, failed and waiting, and the seconds left, if it knows."""

    name: str
    done: int
    failed: int
    waiting: int
    eta_s: float | None


def read_bulk_runs(redis: Redis, now_s: float) -> list[RunProgress]:
    """The runs that Redis knows of."""
    del redis, now_s
    return []
