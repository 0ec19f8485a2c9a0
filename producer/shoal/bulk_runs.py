"""Bulk runs as others see them: how far each has come, from what it says of itself in Redis.

Owns which of it becomes a metric. Read field by field, so that a run of another version shows as
far as it is understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX

KEY_PREFIX = f"{RQ_KEY_PREFIX}:shoal:bulk"
MAX_RUNS = 50  # Each is a few series; a run leaves an hour after it last told of itself.


@dataclass(frozen=True, slots=True)
class RunProgress:
    """One bulk run.

    Attributes:
        run: its id; output: the file it writes, without folder.
        done, failed, waiting: input rows with completions, with an error, and without either.
        eta_s: seconds left at its own pace; None where it does not run or has no pace yet.
    """

    run: str
    output: str
    done: int
    failed: int
    waiting: int
    eta_s: float | None


def read_bulk_runs(redis: Redis) -> list[RunProgress]:
    """The runs that told of themselves in the last hour, the newest of them if there are many."""
    names: Any = redis.zrange(f"{KEY_PREFIX}:runs", -MAX_RUNS, -1)
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.hgetall(f"{KEY_PREFIX}:{name.decode(errors='replace')}")
        hashes: Any = pipeline.execute(raise_on_error=False)
    runs = (
        progress(name.decode(errors="replace"), fields)
        for name, fields in zip(names, hashes, strict=True)
        if isinstance(fields, Mapping)
    )
    return [run for run in runs if run is not None]


def progress(run: str, fields: Mapping[bytes, bytes]) -> RunProgress | None:
    """A run from its hash; None if that says nothing of rows."""
    text = {key.decode(): value.decode(errors="replace") for key, value in fields.items()}
    try:
        total, ended = int(text["rows_total"]), int(text["rows_done"])
        failed = int(text.get("rows_failed", "0"))
        eta_s = float(text["eta_s"]) if "eta_s" in text else None
    except (KeyError, ValueError):
        return None
    return RunProgress(
        run=run,
        output=text.get("output", ""),
        done=max(0, ended - failed),
        failed=failed,
        waiting=max(0, total - ended),
        eta_s=eta_s if text.get("status", "running") == "running" else None,
    )
