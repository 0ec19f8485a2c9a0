"""What happened, as plain values: the only thing metrics are made from.

Nothing here is acted on; whoever wants to count or show something subscribes with a callable.
Durations are seconds of one process's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from shoal.wire import FinishReason

Phase = Literal["prefill", "decode"]


@dataclass(frozen=True, slots=True)
class StepRun:
    """The engine ran one step of a lane.

    Attributes:
        rows: rows that did work; slots: rows computed.
        tokens: positions that did work (prompt tokens read, or tokens made).
        padding_tokens: positions computed for nothing: bucket padding, or idle slots.
        tokens_by_queue: for a decode step, `tokens` by the queue that their rows came from.
    """

    phase: Phase
    lane: str
    rows: int
    slots: int
    tokens: int
    padding_tokens: int
    duration_s: float
    tokens_by_queue: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, slots=True)
class RequestEnded:
    """A request has its result: one finish reason a completion, or an error's code.

    Attributes:
        queue: the RQ queue it came from.
        job_id: of its job; empty where that is not told.
        prompt_tokens...e2e_s: of one with completions; an error has none of them.
        ttft_s: from submission to the first token; None where none was made.
        e2e_s: from submission to the result.
    """

    queue: str
    finish_reasons: tuple[FinishReason, ...]
    error_code: str | None
    job_id: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    queue_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    ttft_s: float | None = None
    e2e_s: float = 0.0


@dataclass(frozen=True, slots=True)
class EngineState:
    """How full the engine is, sent when it changes and at least once a second while busy."""

    requests_running: int
    requests_waiting: int
    slots_in_use: dict[str, tuple[int, int]]
    kv_usage_ratio: float
    shape_cache_misses: int


@dataclass(frozen=True, slots=True)
class EngineLoaded:
    """The engine is ready: what it serves, in which lanes (name to slots), after how long."""

    model_name: str
    fingerprint: str
    device: str
    dtype: str
    load_s: float
    lanes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EngineDied:
    """The engine process ended unasked, and another is started.

    Attributes:
        out_of_memory: it said so before it ended.
        was_split: what it ran is run again in halves.
    """

    out_of_memory: bool
    was_split: bool


@dataclass(frozen=True, slots=True)
class JobsMoved:
    """Jobs went from one place to another: claimed, and from there to one of the ends.

    For each worker, claimed ones are held now, or committed, failed, cancelled, retried or fenced.
    """

    kind: Literal["claimed", "committed", "retried", "abandoned", "fenced", "failed", "cancelled"]
    queue: str
    jobs: int


@dataclass(frozen=True, slots=True)
class RedisRoundTrip:
    """One exchange with Redis, with its outcome."""

    command: str
    duration_s: float
    failed: bool = False


Event = (
    StepRun | RequestEnded | EngineState | EngineLoaded | EngineDied | JobsMoved | RedisRoundTrip
)
Subscriber = Callable[[Event], None]
