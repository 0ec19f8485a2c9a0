"""Metrics of the engine: what its steps did, by lane, what it is and how full it is.

Owns their names, labels, help texts and buckets. A step serves many queues; only the intervals
between its tokens are told apart by queue.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.metadata import version
from typing import get_args

from prometheus_client import CollectorRegistry, Gauge

from shoal_worker.events import EngineDied, EngineLoaded, EngineState, Phase, StepRun
from shoal_worker.families import PREFIX, Declaration

# A step of GPT-2 takes 1 to 3 ms on a GPU and 50 to 150 ms on a CPU: fine in both ranges.
STEP_BOUNDS_S = (
    *(0.0005, 0.00075, 0.001, 0.0015, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03),
    *(0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0),
)
ROW_BOUNDS = tuple(2**power for power in range(8))


class StepMetrics:
    """What the engine's steps did, by lane."""

    def __init__(self, declare: Declaration, queues: Iterable[str]) -> None:
        self._lanes: set[str] = set()
        self._prompt_tokens = declare.counter(
            "prompt_tokens_total", "Prompt tokens read by prefill steps.", lane=()
        )
        self._generation_tokens = declare.counter(
            "generation_tokens_total",
            "Tokens generated: one a row in prefill steps, the rest in decode steps.",
            lane=(),
        )
        self._padding_tokens = declare.counter(
            "padding_tokens_total",
            "Token positions computed for nothing: padding in prefill, idle slots in decode.",
            lane=(),
            phase=(),
        )
        self._prefill_rows = declare.histogram(
            "prefill_batch_rows", "Prompts read together in one prefill step.", ROW_BOUNDS, lane=()
        )
        self._inter_token = declare.histogram(
            "inter_token_latency_seconds",
            "Seconds between two tokens of a sequence, one observation a token of decode steps.",
            STEP_BOUNDS_S,
            queue=queues,
        )
        self._duration = declare.histogram(
            "step_duration_seconds",
            "Seconds of a prefill step; of a decode step, since its lane's step before it.",
            STEP_BOUNDS_S,
            lane=(),
            phase=(),
        )

    def add_lane(self, lane: str) -> None:
        """Let every series of a lane stand at 0."""
        self._lanes.add(lane)
        self._prompt_tokens(lane)
        self._generation_tokens(lane)
        self._prefill_rows(lane)
        for phase in get_args(Phase):
            self._padding_tokens(lane, phase)
            self._duration(lane, phase)

    def run(self, event: StepRun) -> None:
        """One step of one lane."""
        lane = event.lane
        if lane not in self._lanes:
            self.add_lane(lane)
        self._duration(lane, event.phase).observe(event.duration_s)
        self._padding_tokens(lane, event.phase).inc(event.padding_tokens)
        if event.phase == "prefill":
            self._prompt_tokens(lane).inc(event.tokens)
            self._generation_tokens(lane).inc(event.rows)
            self._prefill_rows(lane).observe(event.rows)
        elif event.tokens:
            self._generation_tokens(lane).inc(event.tokens)
            # A step that makes several tokens a row spreads its time over them.
            interval_s = event.duration_s * event.rows / event.tokens
            for queue, tokens in event.tokens_by_queue:
                self._inter_token(queue).observe(interval_s, tokens)


class EngineMetrics:
    """What the engine is and how full it is."""

    def __init__(self, declare: Declaration, registry: CollectorRegistry, model_name: str) -> None:
        self._model_name = model_name
        self._misses_seen = 0
        self._running = declare.gauge("requests_running", "Sequences in a slot.")
        self._waiting = declare.gauge(
            "requests_waiting", "Sequences of claimed jobs that no slot has yet."
        )
        self._slots_active = declare.gauge("decode_slots_active", "Slots in use.", lane=())
        self._slots_total = declare.gauge("decode_slots_total", "Slots there are.", lane=())
        self._kv_usage = declare.gauge(
            "kv_cache_usage_ratio", "Share of cache positions that hold a live token, 0 to 1."
        )
        self._shape_misses = declare.counter(
            "shape_cache_misses_total", "Steps that were the first to run in their shape."
        )
        self._deaths = declare.counter(
            "engine_deaths_total", "Engine processes that ended unasked and were replaced."
        )
        self._oom_splits = declare.counter(
            "oom_splits_total",
            "Times that what ran when memory ran out was run again in halves.",
        )
        self._load_seconds = declare.gauge(
            "model_load_seconds", "Seconds from the engine's start until it could serve."
        )
        self._info = Gauge(
            PREFIX + "worker_info",
            "What this worker is; always 1.",
            ("model_name", "version", "device", "dtype", "fingerprint"),
            registry=registry,
        )

    def state(self, event: EngineState) -> None:
        """How full the engine is now."""
        self._running().set(event.requests_running)
        self._waiting().set(event.requests_waiting)
        self._kv_usage().set(event.kv_usage_ratio)
        self.set_slots(event.slots_in_use)
        self._shape_misses().inc(max(0, event.shape_cache_misses - self._misses_seen))
        self._misses_seen = event.shape_cache_misses

    def died(self, event: EngineDied) -> None:
        """An engine ended unasked."""
        self._deaths().inc()
        if event.out_of_memory and event.was_split:
            self._oom_splits().inc()

    def loaded(self, event: EngineLoaded) -> None:
        """A first engine, or another after one that died, which counts from 0 and is empty."""
        self._misses_seen = 0
        self._running().set(0)
        self._waiting().set(0)
        self._kv_usage().set(0)
        self.set_slots({lane: (0, slots) for lane, slots in event.lanes.items()})
        self._load_seconds().set(event.load_s)
        self._info.clear()
        self._info.labels(
            self._model_name, version("shoal"), event.device, event.dtype, event.fingerprint
        ).set(1)

    def set_slots(self, slots_in_use: Mapping[str, tuple[int, int]]) -> None:
        """For each lane: slots in use and slots there are."""
        for lane, (active, total) in slots_in_use.items():
            self._slots_active(lane).set(active)
            self._slots_total(lane).set(total)
