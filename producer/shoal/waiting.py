"""How many requests wait in a queue, where one job may hold many: from a bounded look at its jobs.

Owns the bound and the estimate. Raw reads of jobs' plain `meta` only; prompts are never read.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX

MAX_LOOKED_AT = 256  # Jobs at each end of a queue; a few milliseconds for a queue of any length.
MAX_REQUESTS_OF_A_JOB = 1_000_000  # As in `claim.lua`: beyond it, `meta` is not ours.


def read_waiting_requests(redis: Redis, depths: Mapping[str, int]) -> dict[str, int]:
    """Requests waiting in each queue.

    Exact where a queue holds no more than twice `MAX_LOOKED_AT` jobs; beyond, its two ends are
    taken for the whole.

    Args:
        depths: jobs waiting, by queue.
    """
    ids = _ends(redis, [name for name, depth in depths.items() if depth])
    sizes = _sizes(redis, [job_id for some in ids.values() for job_id in some])
    return {
        name: estimate([sizes[job_id] for job_id in ids.get(name, ())], depth)
        for name, depth in depths.items()
    }


def estimate(sizes: Sequence[int], depth: int) -> int:
    """Requests in a queue of `depth` jobs of which some hold `sizes` requests."""
    if not sizes:
        return depth
    return round(sum(sizes) * max(1.0, depth / len(sizes)))


def requests_of(meta: bytes | str | None) -> int:
    """Requests in a job with this `meta`, counted as a worker's claim counts them; at least one."""
    try:
        facts = json.loads(meta or "{}")
        number = int(facts["requests"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 1
    return number if 1 <= number < MAX_REQUESTS_OF_A_JOB else 1


def _ends(redis: Redis, names: Sequence[str]) -> dict[str, list[bytes]]:
    """The ids at both ends of each queue, none twice while the queue stands still."""
    with redis.pipeline(transaction=False) as pipeline:
        for name in names:
            key = f"{RQ_KEY_PREFIX}:queue:{name}"
            pipeline.lrange(key, 0, MAX_LOOKED_AT - 1)
            pipeline.lrange(key, -MAX_LOOKED_AT, -1)
        replies: Any = pipeline.execute()
    pairs = zip(replies[::2], replies[1::2], strict=True)
    return {
        name: list(dict.fromkeys([*head, *tail]))
        for name, (head, tail) in zip(names, pairs, strict=True)
    }


def _sizes(redis: Redis, job_ids: Iterable[bytes]) -> dict[bytes, int]:
    ids = list(dict.fromkeys(job_ids))
    with redis.pipeline(transaction=False) as pipeline:
        for job_id in ids:
            pipeline.hget(f"{RQ_KEY_PREFIX}:job:{job_id.decode(errors='replace')}", "meta")
        replies: Any = pipeline.execute(raise_on_error=False)
    metas = (None if isinstance(reply, Exception) else reply for reply in replies)
    return {job_id: requests_of(meta) for job_id, meta in zip(ids, metas, strict=True)}
