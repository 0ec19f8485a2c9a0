"""Prometheus metrics: a subscriber that turns events into counts and histograms.

Owns which event moves what, and the names, labels, help texts and buckets of what has a queue. It
knows nothing of who sends events, of Redis, or of how metrics are served.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import get_args

from prometheus_client import CollectorRegistry

from shoal.wire import FinishReason
from shoal_worker.engine_metrics import EngineMetrics, StepMetrics
from shoal_worker.events import (
    EngineDied,
    EngineLoaded,
    EngineState,
    Event,
    JobsMoved,
    RedisRoundTrip,
    RequestEnded,
    StepRun,
)
from shoal_worker.families import Declaration, WeightedSeries

ERROR_CODES = (
    "cancelled",
    "expired",
    "internal_error",
    "invalid_request",
    "killed_engine",
    "model_mismatch",
    "prompt_too_long",
)
REDIS_COMMANDS = ("claim", "commit", "look", "recover", "renew")

# Objectives are round: 200 ms or 1 s for people who wait, minutes to hours for bulk.
LATENCY_BOUNDS_S = (
    *(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0),
    *(300.0, 600.0, 1800.0, 3600.0, 14400.0, 86400.0),
)
PHASE_BOUNDS_S = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 30.0),
    *(60.0, 120.0, 300.0, 600.0),
)
REDIS_BOUNDS_S = (
    *(0.0001, 0.0002, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    *(2.0, 5.0, 10.0, 30.0),
)
TOKEN_BOUNDS = tuple(2**power for power in range(18))


class PrometheusMetrics:
    """Counts events into a registry.

    Args:
        model_name: the name in results, which labels every series.
        queues: the RQ queues that the worker serves.
        lanes: slots by lane name, where they are known before `EngineLoaded` brings them.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        *,
        model_name: str,
        queues: Sequence[str],
        lanes: Mapping[str, int] = {},
    ) -> None:
        declare = Declaration(registry, model_name)
        self._requests = _RequestMetrics(declare, queues)
        self._steps = StepMetrics(declare, queues)
        self._engine = EngineMetrics(declare, registry, model_name)
        self._jobs = _JobMetrics(declare, queues)
        self._redis = _RedisMetrics(declare)
        for lane in lanes:
            self._steps.add_lane(lane)
        self._engine.set_slots({lane: (0, slots) for lane, slots in lanes.items()})

    def __call__(self, event: Event) -> None:
        """Count one event."""
        match event:
            case StepRun():
                self._steps.run(event)
            case RequestEnded():
                self._requests.ended(event)
            case EngineState():
                self._engine.state(event)
            case EngineLoaded():
                for lane in event.lanes:
                    self._steps.add_lane(lane)
                self._engine.loaded(event)
            case EngineDied():
                self._engine.died(event)
            case JobsMoved():
                self._jobs.moved(event)
            case RedisRoundTrip():
                self._redis.round_trip(event)


class _RequestMetrics:
    """How requests ended, by queue, and how long those took that have a result."""

    def __init__(self, declare: Declaration, queues: Sequence[str]) -> None:
        self._success = declare.counter(
            "request_success_total",
            "Completions by how they ended; a request with n samples counts n.",
            queue=queues,
            finished_reason=get_args(FinishReason),
        )
        self._failed = declare.counter(
            "requests_failed_total",
            "Requests answered with an error, by its code.",
            queue=queues,
            code=ERROR_CODES,
        )

        def histogram(
            name: str, text: str, bounds: Sequence[float]
        ) -> Callable[..., WeightedSeries]:
            return declare.histogram(name, text, bounds, queue=queues)

        self._ttft = histogram(
            "time_to_first_token_seconds", "Seconds from submit to first token.", LATENCY_BOUNDS_S
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "Seconds from submit to the result.", LATENCY_BOUNDS_S
        )
        self._queue = histogram(
            "request_queue_time_seconds", "Seconds from submit to first prefill.", LATENCY_BOUNDS_S
        )
        self._prefill = histogram(
            "request_prefill_time_seconds",
            "Seconds from the first prefill's start to the first token.",
            PHASE_BOUNDS_S,
        )
        self._decode = histogram(
            "request_decode_time_seconds", "Seconds from first token to last.", PHASE_BOUNDS_S
        )
        self._prompt_tokens = histogram(
            "request_prompt_tokens", "Prompt tokens of a request.", TOKEN_BOUNDS
        )
        self._generation_tokens = histogram(
            "request_generation_tokens", "Tokens generated, all samples together.", TOKEN_BOUNDS
        )

    def ended(self, event: RequestEnded) -> None:
        """One request has its result."""
        queue = event.queue
        if event.error_code is not None:
            # A refusal takes no time: among the latencies it would make a bad day look good.
            self._failed(queue, event.error_code).inc()
            return
        for reason in event.finish_reasons:
            self._success(queue, reason).inc()
        self._e2e(queue).observe(event.e2e_s)
        self._queue(queue).observe(event.queue_s)
        self._prompt_tokens(queue).observe(event.prompt_tokens)
        self._generation_tokens(queue).observe(event.completion_tokens)
        if event.ttft_s is not None:
            self._ttft(queue).observe(event.ttft_s)
            self._prefill(queue).observe(event.prefill_s)
            self._decode(queue).observe(event.decode_s)


class _JobMetrics:
    """Where jobs went, by queue."""

    def __init__(self, declare: Declaration, queues: Sequence[str]) -> None:
        self._claimed = declare.counter("jobs_claimed_total", "Jobs claimed.", queue=queues)
        self._committed = declare.counter(
            "jobs_committed_total",
            "Claimed jobs that ended: with results, as failed, or cancelled while they ran.",
            queue=queues,
            outcome=("finished", "failed", "cancelled"),
        )
        self._retried = declare.counter(
            "jobs_retried_total", "Claimed jobs given back to their queue.", queue=queues
        )
        self._abandoned = declare.counter(
            "jobs_abandoned_total", "Jobs taken back from a worker that had died.", queue=queues
        )
        self._fenced = declare.counter(
            "commits_fenced_total",
            "Jobs whose results are refused: they were not ours any more.",
            queue=queues,
        )
        self._last_commit = declare.gauge(
            "last_commit_timestamp_seconds", "Unix time of the last commit; 0 before the first."
        )

    def moved(self, event: JobsMoved) -> None:
        """Jobs of one queue went one way."""
        match event.kind:
            case "claimed":
                self._claimed(event.queue).inc(event.jobs)
            case "committed":
                self._commit(event, "finished")
            case "failed":
                self._commit(event, "failed")
            case "cancelled":
                self._committed(event.queue, "cancelled").inc(event.jobs)  # Not by our commit.
            case "retried":
                self._retried(event.queue).inc(event.jobs)
            case "abandoned":
                self._abandoned(event.queue).inc(event.jobs)
            case "fenced":
                self._fenced(event.queue).inc(event.jobs)

    def _commit(self, event: JobsMoved, outcome: str) -> None:
        self._committed(event.queue, outcome).inc(event.jobs)
        self._last_commit().set_to_current_time()


class _RedisMetrics:
    """How Redis answers, by what was asked of it."""

    def __init__(self, declare: Declaration) -> None:
        self._errors = declare.counter(
            "redis_errors_total", "Exchanges with Redis that failed.", command=REDIS_COMMANDS
        )
        self._round_trip = declare.histogram(
            "redis_round_trip_seconds",
            "Seconds of an exchange with Redis, failed ones included.",
            REDIS_BOUNDS_S,
            command=REDIS_COMMANDS,
            outcome=("ok", "error"),
        )

    def round_trip(self, event: RedisRoundTrip) -> None:
        """One exchange, answered or not."""
        outcome = "error" if event.failed else "ok"
        self._round_trip(event.command, outcome).observe(event.duration_s)
        if event.failed:
            self._errors(event.command).inc()
