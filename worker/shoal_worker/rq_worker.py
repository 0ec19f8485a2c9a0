"""The worker process: claims jobs for the engine's free capacity, commits what it answers.

Owns the order of things: what is claimed when, what happens on a signal, an engine's death or
Redis's absence. How a job is claimed and ended is `rq_lifecycle`'s; what it does, the engine's.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Literal

from rq.utils import now
from rq.worker.base import WorkerStatus

from shoal.jobs import stream_key
from shoal.redis_url import connect
from shoal.wire import FUNCTION_NAME
from shoal_worker.engine_link import EngineLink
from shoal_worker.engine_process import EngineProcess
from shoal_worker.events import (
    EngineLoaded,
    EngineState,
    Event,
    JobsMoved,
    Subscriber,
)
from shoal_worker.held_jobs import HeldJobs
from shoal_worker.messages import (
    Cancel,
    Drain,
    FromEngine,
    JobDone,
    JobRefused,
    Observed,
    Ready,
    Submit,
    TextDelta,
    Unstarted,
)
from shoal_worker.redis_watch import AWAY, RedisWatch
from shoal_worker.rq_lifecycle import (
    Abandoned,
    Claimed,
    Failed,
    GivenBack,
    Lifecycle,
    Outcome,
    Succeeded,
    refusal,
)
from shoal_worker.rq_presence import Every, Presence
from shoal_worker.settings import WorkerSettings
from shoal_worker.throughput import Throughput

RECOVER_S = 5.0
CANCELLATIONS_S = 0.5  # They are heard of with the renewal of leases.
STREAM_TTL_S = 3_600

EXIT_DRAINED = 0
EXIT_GAVE_BACK = 1

log = logging.getLogger("shoal.worker")


class Worker:
    """One worker: its registration with RQ, its engine process and the jobs between the two.

    Args:
        redis_url: of the server that holds the queues.
        subscribers: take every event, the engine's and our own.
        start_engine: starts an engine process; again after each death.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        redis_url: str,
        subscribers: tuple[Subscriber, ...] = (),
        start_engine: Callable[[], EngineProcess] | None = None,
    ) -> None:
        self._settings = settings
        self._redis = connect(redis_url)
        # Claims and commits are not idempotent: this client never sends one again by itself.
        self._presence = Presence(settings.queues, settings.name, connect(redis_url, retries=0))
        self._lifecycle = Lifecycle(self._presence.worker, lease_s=settings.lease_s)
        self._throughput = Throughput()
        self._subscribers: tuple[Subscriber, ...] = (self._throughput, *subscribers)
        self._watch = RedisWatch(self._emit)
        self._engine = EngineLink(
            start_engine or (lambda: EngineProcess(settings.engine, settings.log_level))
        )
        self._held = HeldJobs()
        self._signals = 0
        self._drain_ends_s: float | None = None
        self._renew_every = Every(min(settings.lease_s / 3, CANCELLATIONS_S))
        self._recover_every = Every(min(settings.lease_s / 3, RECOVER_S))
        self._state: EngineState | None = None
        self._burst_is_over = False
        self._gave_back = False

    def healthy(self) -> str | None:
        """None while the engine makes progress, else what is wrong."""
        return self._engine.trouble(has_work=bool(self._held))

    def ready(self) -> str | None:
        """None when the model is loaded and Redis answers, else what is missing."""
        if self._engine.ready is None:
            return "the model is being loaded"
        if self._watch.is_away:
            return "Redis does not answer"
        return None

    def run(self, announce: Callable[[Ready], None]) -> int:
        """Serve until a signal, `rq`'s shutdown command, or (burst) until the queues are empty.

        Args:
            announce: called once, when the first job could be taken.

        Returns:
            The exit code: 0 drained, 1 gave work back.

        Raises:
            EngineFailedError: the model cannot be loaded, or the engine keeps dying.
        """
        announced = False
        with self._handled_signals(), self._presence.registered():
            try:
                self._engine.start()
                while not self._is_over():
                    self._turn()
                    if self._engine.ready is not None and not announced:
                        announce(self._engine.ready)
                        announced = True
            finally:
                self._give_back_everything()
                self._engine.stop()
        return EXIT_GAVE_BACK if self._gave_back else EXIT_DRAINED

    def _turn(self) -> None:
        """Once around: news from the engine, results out, leases, commands, new jobs in."""
        self._begin_drain_if_asked()
        self._receive(self._settings.poll_s)
        with self._watch.answering():
            self._commit()
            self._beat()
            self._renew()
            self._obey_commands()
            self._recover()
            self._claim()
            self._look_for_the_end()

    def _is_over(self) -> bool:
        if self._signals >= 2:
            return True
        if self._drain_ends_s is not None:
            return self._held.is_empty or time.monotonic() >= self._drain_ends_s
        return self._burst_is_over

    def _look_for_the_end(self) -> None:
        if self._settings.burst and self._engine.ready and self._held.is_empty:
            keys = self._presence.worker.queue_keys()
            self._burst_is_over = all(self._redis.llen(key) == 0 for key in keys)

    def _receive(self, timeout_s: float) -> None:
        messages = self._engine.receive(timeout_s)
        if messages is None:
            self._held.abandon_all()
            return
        for message in messages:
            self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self._emit(_loaded(message))
            case JobDone(job_id, result):
                self._held.end(job_id, lambda claimed: Succeeded(claimed, result))
            case JobRefused(job_id, reason):
                self._held.end(job_id, lambda claimed: Failed(claimed, reason))
            case Unstarted(job_ids):
                for job_id in job_ids:
                    self._held.end(job_id, GivenBack)
            case TextDelta():
                self._publish(message)
            case Observed(events):
                for event in events:
                    self._emit(event)

    def _claim(self) -> None:
        if self._drain_ends_s is not None or self._engine.ready is None:
            return
        capacity = self._settings.max_in_flight or self._engine.ready.num_slots * 3 // 2
        room = capacity - self._held.num_requests
        if room <= 0 or self._presence.is_suspended():
            return
        with self._watch.timed("claim"):
            claimed = self._lifecycle.claim(room)
        for one in claimed:
            self._emit(JobsMoved("claimed", one.queue, 1))
            reason = refusal(one, FUNCTION_NAME)
            if reason is not None:
                self._held.refuse(one, reason)
                continue
            self._hold(one)

    def _hold(self, claimed: Claimed) -> None:
        self._held.hold(claimed)
        job = claimed.job
        submitted = job.enqueued_at or job.created_at
        queued_s = max(0.0, (now() - submitted).total_seconds())
        queues = self._settings.queues
        # A job that somebody moved here from another queue keeps that one's name.
        priority = queues.index(claimed.queue) if claimed.queue in queues else len(queues)
        meta: object = job.meta
        args: Any = job.args
        streams = isinstance(meta, dict) and bool(meta.get("stream"))
        is_one = isinstance(args, list | tuple) and len(args) == 1 and not job.kwargs
        argument = args[0] if is_one else None
        try:
            self._engine.tell(
                Submit(claimed.id, claimed.queue, argument, queued_s, priority, streams)
            )
        except RecursionError:
            reason = "the job's argument is nested too deeply to be a GenerationJob"
            self._held.end(claimed.id, lambda one: Failed(one, reason))

    def _commit(self) -> None:
        outcomes = list(self._held.outcomes)
        if not outcomes:
            return
        with self._watch.timed("commit"):
            committed = self._lifecycle.commit(outcomes)
        # Only now: had Redis not answered, the next turn would try again.
        del self._held.outcomes[: len(outcomes)]
        for outcome, ran in zip(outcomes, committed, strict=True):
            self._emit(JobsMoved(_kind(outcome) if ran else "fenced", outcome.claimed.queue, 1))
            self._gave_back |= isinstance(outcome, GivenBack)
            if not ran:
                log.warning(
                    "job %s was not ours any more; its result is dropped", outcome.claimed.id
                )

    def _renew(self) -> None:
        if not self._renew_every.is_due():
            return
        with self._watch.timed("renew"):
            renewals = self._lifecycle.renew(self._held.all())
        for renewal in renewals:
            if renewal.state != "held":
                log.info("job %s is %s", renewal.claimed.id, renewal.state)
                self._drop(renewal.claimed.id)
                continue
            for index in renewal.cancelled_requests:
                self._engine.tell(Cancel(renewal.claimed.id, index))

    def _drop(self, job_id: str) -> None:
        self._held.drop(job_id)
        self._engine.tell(Cancel(job_id))

    def _obey_commands(self) -> None:
        for command in self._presence.worker.take_commands():
            match command.get("command"):
                case "shutdown":
                    self._signals += 1
                case "stop-job":
                    self._stop_job(str(command.get("job_id")))
                case "stop-execution":
                    execution_id = command.get("execution_id")
                    for claimed in self._held.all():
                        if claimed.execution.id == execution_id:
                            self._stop_job(claimed.id)
                case other:
                    log.warning("command %s is not for a worker that runs many jobs", other)

    def _stop_job(self, job_id: str) -> None:
        if job_id in self._held:
            self._held.end(job_id, lambda claimed: Failed(claimed, "stopped on request"))
            self._engine.tell(Cancel(job_id))

    def _recover(self) -> None:
        if self._recover_every.is_due():
            with self._watch.timed("recover"):
                recovered = self._lifecycle.recover()
            for one in recovered:
                log.warning("job %s had lost its worker", one.job_id)
                self._emit(JobsMoved("failed" if one.failed else "abandoned", one.queue, 1))
        self._presence.clean_registries()

    def _beat(self) -> None:
        if self._engine.ready is None:
            state = WorkerStatus.STARTED
        else:
            state = WorkerStatus.BUSY if self._held else WorkerStatus.IDLE
        self._presence.beat(state, self._facts)

    def _facts(self) -> dict[Any, Any]:
        ready = self._engine.ready
        if ready is None:
            return {}
        return {
            "shoal_model": ready.model_name,
            "shoal_device": ready.device,
            "shoal_fingerprint": ready.fingerprint,
            "shoal_slots": ready.num_slots,
            "shoal_running": self._state.requests_running if self._state else 0,
            "shoal_tokens_per_s": round(self._throughput.tokens_per_s(), 1),
            "shoal_padding_ratio": round(self._throughput.padding_ratio(), 4),
        }

    def _publish(self, delta: TextDelta) -> None:
        key = stream_key(delta.job_id)
        try:
            with self._redis.pipeline(transaction=False) as pipeline:
                pipeline.xadd(key, {"at": delta.at, "text": delta.text})
                pipeline.expire(key, STREAM_TTL_S)
                pipeline.execute()
        except AWAY as error:
            # The result carries the whole text; who reads along only sees it later.
            log.warning("text of job %s was not streamed: %s", delta.job_id, error)

    def _begin_drain_if_asked(self) -> None:
        if not self._signals or self._drain_ends_s is not None:
            return
        log.info("stopping: work in flight is finished, the rest goes back to its queue")
        self._drain_ends_s = time.monotonic() + self._settings.drain_timeout_s
        if self._held:
            self._engine.tell(Drain())

    def _give_back_everything(self) -> None:
        """At the end: what is still held runs elsewhere."""
        self._held.give_back_all()
        try:
            self._commit()
        except AWAY as error:
            self._gave_back = True
            log.error("Redis fails, so jobs come back by their lease: %s", error)

    def _emit(self, event: Event) -> None:
        if isinstance(event, EngineState):
            self._state = event
        for subscriber in self._subscribers:
            subscriber(event)

    @contextmanager
    def _handled_signals(self) -> Iterator[None]:
        def note(_number: int, _frame: FrameType | None) -> None:
            # Nothing more here: it may interrupt a message to the engine half way.
            self._signals += 1

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _loaded(ready: Ready) -> EngineLoaded:
    return EngineLoaded(
        ready.model_name, ready.fingerprint, ready.device, ready.dtype, ready.load_s, ready.lanes
    )


def _kind(outcome: Outcome) -> Literal["committed", "failed", "retried", "abandoned"]:
    match outcome:
        case Succeeded():
            return "committed"
        case Failed():
            return "failed"
        case GivenBack():
            return "retried"
        case Abandoned():
            return "abandoned"
