"""The worker process: claims jobs for the engine's free capacity, commits what it answers.

Owns the order of things: what is claimed when, what happens on a signal, an engine's death or
Redis's absence. How a job is claimed and ended is `rq_lifecycle`'s; what it does, the engine's.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import Any, Literal

import redis
from rq.worker.base import WorkerStatus

from shoal.jobs import stream_key
from shoal.redis_url import SOCKET_TIMEOUT_S, connect
from shoal.wire import FUNCTION_NAME
from shoal_worker.dispatcher import Dispatcher
from shoal_worker.engine_link import EngineLink
from shoal_worker.engine_process import EngineProcess
from shoal_worker.events import (
    EngineLoaded,
    EngineState,
    Event,
    JobsMoved,
    RequestEnded,
    Subscriber,
)
from shoal_worker.held_jobs import HeldJobs
from shoal_worker.messages import FromEngine, JobDone, JobRefused, Observed, Ready, TextDelta
from shoal_worker.queue_bell import QueueBell
from shoal_worker.redis_watch import MAX_RETRY_S, RedisWatch, is_away
from shoal_worker.rq_lifecycle import MAX_JOBS_PER_RECOVERY, Lifecycle, refusal
from shoal_worker.rq_outcomes import (
    Failed,
    GivenBack,
    Outcome,
    Room,
    Stopped,
    Succeeded,
    Superseded,
)
from shoal_worker.rq_presence import Every, Presence
from shoal_worker.settings import WorkerSettings
from shoal_worker.throughput import Throughput

RECOVER_S = 5.0
CANCELLATIONS_S = 0.5  # They are heard of with the renewal of leases.
BACKLOG_WAIT_S = 0.01
COMMANDS_S = 0.2  # They arrive on a thread of RQ's and are obeyed this often.
STREAM_TTL_S = 3_600
# As many requests again as run: what ends at once, as equal lengths do, is refilled at once.
SLOTS_AHEAD = 2
# A job is answered whole, so the results of its short requests wait for its longest one. So many
# times the requests in flight may be held with them.
MAX_HELD_RATIO = 4

EXIT_DRAINED = 0
EXIT_GAVE_BACK = 1

_End = Literal["committed", "failed", "retried", "fenced", "cancelled"]

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
        # Claims and commits are not idempotent: this client never sends one again by itself.
        self._redis = connect(redis_url, retries=0)
        self._presence = Presence(settings.queues, settings.name, self._redis)
        self._lifecycle = Lifecycle(
            self._presence.worker, lease_s=settings.lease_s, callbacks=settings.allow_callbacks
        )
        keys = self._presence.worker.queue_keys()
        self._bell = QueueBell(connect(redis_url, retries=0), keys, settings.poll_s)
        self._throughput = Throughput()
        self._subscribers: tuple[Subscriber, ...] = (self._throughput, *subscribers)
        # Back well within the lease that others wait before they take what is overdue.
        self._watch = RedisWatch(self._emit, min(MAX_RETRY_S, settings.lease_s / 4))
        self._engine = EngineLink(
            start_engine
            or (
                lambda: EngineProcess(
                    settings.engine, settings.log_level, log_format=settings.log_format
                )
            ),
            hang_s=settings.hang_timeout_s,
        )
        self._held = HeldJobs()
        self._dispatcher = Dispatcher(self._engine, self._held, settings.queues, self._emit)
        self._deltas: list[TextDelta] = []
        self._signals = 0
        self._drain_ends_s: float | None = None
        self._renew_every = Every(settings.lease_s / 3)
        self._look_every = Every(min(settings.lease_s / 3, CANCELLATIONS_S))
        self._recover_every = Every(min(settings.lease_s / 3, RECOVER_S))
        self._recover_after_s = float("-inf")
        # After an absence of Redis: others may still wait for a reply that never comes.
        self._grace_s = settings.lease_s + SOCKET_TIMEOUT_S
        self._state: EngineState | None = None
        self._burst_is_over = False
        self._gave_back = False

    @property
    def engine_pid(self) -> int | None:
        """The engine's process id, if it has been started."""
        return self._engine.pid

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
        with (
            closing(self._redis),
            self._handled_signals(),
            self._presence.registered() as uptime_s,
            closing(self._bell),
        ):
            # Redis has just come back, perhaps: holders of leases go first.
            self._recover_after_s = time.monotonic() + self._grace_s - uptime_s
            try:
                self._engine.start()
                while not self._is_over():
                    self._turn()
                    if self._engine.ready is not None and not announced:
                        announce(self._engine.ready)
                        announced = True
            finally:
                try:
                    self._give_back_everything()
                finally:
                    self._engine.stop()
        return EXIT_GAVE_BACK if self._gave_back else EXIT_DRAINED

    def _turn(self) -> None:
        """Once around: news from the engine, leases, results out, commands, new jobs in."""
        self._begin_drain_if_asked()
        self._receive()
        if self._watch.is_away:
            self._look_every.reset()
            self._renew_every.reset()
            self._recover_after_s = time.monotonic() + self._grace_s
        with self._watch.answering():
            self._renew()  # First, also after an absence: whose lease has run out is still holder.
            self._commit()
            self._publish()
            self._beat()
            self._obey_commands()
            self._recover()
            self._claim()
            self._run_next_group()
            self._look_for_the_end()

    def _is_over(self) -> bool:
        if self._signals >= 2:
            return True
        if self._drain_ends_s is not None:
            return self._held.is_empty or time.monotonic() >= self._drain_ends_s
        return self._burst_is_over

    def _look_for_the_end(self) -> None:
        if self._settings.burst and self._engine.ready and self._held.is_empty:
            # What is left in a queue is bound to workers of another kind.
            self._burst_is_over = self._presence.is_suspended() or self._lifecycle.saw_nothing

    def _receive(self) -> None:
        wait_s = min(self._bell.wait_s(), COMMANDS_S)
        if self._bell.has_backlog and self._room() is not None:
            wait_s = BACKLOG_WAIT_S
        messages = self._engine.receive(wait_s, wake=self._bell.fd, has_work=bool(self._held))
        if messages is None:
            self._dispatcher.engine_died()
            return
        for message in messages:
            self._take(message)

    def _take(self, message: FromEngine) -> None:
        match message:
            case Ready():
                self._emit(_loaded(message))
            case JobDone():
                self._dispatcher.done(message)
            case JobRefused():
                self._dispatcher.refused(message)
            case TextDelta():
                self._deltas.append(message)
            case Observed(events):
                for event in events:
                    if isinstance(event, RequestEnded):
                        self._held.request_ended(event.job_id, len(event.finish_reasons))
                    self._emit(event)

    def _claim(self) -> None:
        room = self._room()
        if room is None or self._presence.is_suspended() or not self._bell.should_look():
            return
        fingerprint = self._engine.served.fingerprint if self._engine.served else ""
        with self._watch.timed("claim"):
            claimed = self._lifecycle.claim(room, fingerprint)
        self._bell.looked(found=bool(claimed))
        for one in claimed:
            self._emit(JobsMoved("claimed", one.queue, 1))
            reason = refusal(one, FUNCTION_NAME, allow_callbacks=self._settings.allow_callbacks)
            if reason is None:
                self._dispatcher.give(one)
            else:
                self._held.refuse(one, reason)

    def _room(self) -> Room | None:
        """What could be claimed now; None if nothing may be."""
        ready = self._engine.ready
        if ready is None or self._drain_ends_s is not None or not self._dispatcher.takes_more:
            return None
        limit = self._settings.max_in_flight or ready.num_slots * SLOTS_AHEAD
        reserve = limit // 8 if self._settings.reserve is None else self._settings.reserve
        held = self._held
        room = Room(
            min(limit - held.num_open, MAX_HELD_RATIO * limit - held.num_requests),
            max(limit, ready.num_positions * SLOTS_AHEAD) - held.num_open_tokens,
            reserve - held.num_open_of(self._settings.queues[0]),
        )
        return None if room.is_none else room

    def _run_next_group(self) -> None:
        """Let suspects run whose turn it is, after noting that they do: see `recover.lua`."""
        group = self._dispatcher.next_group()
        if group:
            self._lifecycle.renew(self._held.all(), self._dispatcher.waiting_jobs)
            self._dispatcher.run(group)

    def _commit(self) -> None:
        while outcomes := self._held.to_commit():
            with self._watch.timed("commit"):
                committed = self._lifecycle.commit(outcomes)
            # Only now: had Redis not answered, the next turn would ask with the same ones.
            done = outcomes[: len(committed)]
            self._held.committed(len(committed))
            for outcome, ran in zip(done, committed, strict=True):
                kind = _kind(outcome) if ran else "fenced"
                self._emit(JobsMoved(kind, outcome.claimed.queue, 1))
                self._gave_back |= ran and isinstance(outcome, GivenBack)
                if not ran:
                    log.warning("job %s was not ours any more", outcome.claimed.id)

    def _renew(self) -> None:
        if not self._look_every.is_due():
            return
        only_look = not self._renew_every.is_due()
        jobs, waiting = self._held.leased(), self._dispatcher.waiting_jobs
        with self._watch.timed("look" if only_look else "renew"):
            renewals = self._lifecycle.renew(jobs, waiting, only_look=only_look)
        for renewal in renewals:
            job_id = renewal.claimed.id
            if not self._held.runs(renewal.claimed):
                continue  # It has ended; its commit will hear the same.
            if renewal.state != "held":
                log.info("job %s is %s", job_id, renewal.state)
                self._dispatcher.drop(job_id)
                # What the engine still makes of it is refused here, without asking Redis.
                was_lost = renewal.state == "lost"
                kind: _End = "fenced" if was_lost else "cancelled"
                self._emit(JobsMoved(kind, renewal.claimed.queue, 1))
                continue
            for index in renewal.cancelled_requests:
                self._dispatcher.cancel_request(job_id, index)

    def _obey_commands(self) -> None:
        for command in self._presence.worker.take_commands():
            match command.get("command"):
                case "shutdown":
                    self._signals += 1
                case "stop-job":
                    self._dispatcher.stop(str(command.get("job_id")))
                case "stop-execution":
                    execution_id = command.get("execution_id")
                    for claimed in self._held.all():
                        if claimed.execution.id == execution_id:
                            self._dispatcher.stop(claimed.id)
                case other:
                    log.warning("command %s is not for a worker that runs many jobs", other)

    def _recover(self) -> None:
        is_early = time.monotonic() < self._recover_after_s
        if not is_early and self._recover_every.is_due():
            with self._watch.timed("recover"):
                recovered = self._lifecycle.recover()
            for one in recovered:
                log.warning("job %s had lost its worker", one.job_id)
                self._emit(JobsMoved("failed" if one.failed else "abandoned", one.queue, 1))
            if len(recovered) == MAX_JOBS_PER_RECOVERY:
                self._recover_every.reset()  # There may be more, and they have waited long enough.
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
        tokens, padding_tokens = self._throughput.totals()
        return {
            "shoal_model": ready.model_name,
            "shoal_device": ready.device,
            "shoal_fingerprint": ready.fingerprint,
            "shoal_slots": ready.num_slots,
            "shoal_running": self._state.requests_running if self._state else 0,
            "shoal_tokens_per_s": round(self._throughput.tokens_per_s(), 1),
            "shoal_busy_tokens_per_s": round(self._throughput.busy_tokens_per_s(), 1),
            "shoal_padding_ratio": round(self._throughput.padding_ratio(), 4),
            "shoal_tokens": tokens,
            "shoal_padding_tokens": padding_tokens,
        }

    def _publish(self) -> None:
        """Text as it is made; what Redis does not take is in the result all the same."""
        deltas, self._deltas = self._deltas, []
        if not deltas:
            return
        with self._redis.pipeline(transaction=False) as pipeline:
            for delta in deltas:
                key = stream_key(delta.job_id)
                pipeline.xadd(key, {"at": delta.at, "text": delta.text})
                pipeline.expire(key, STREAM_TTL_S)
            pipeline.execute()

    def _begin_drain_if_asked(self) -> None:
        if not self._signals or self._drain_ends_s is not None:
            return
        drain_s = self._settings.drain_timeout_s
        log.info("stopping: %d jobs in flight have %g s to finish", len(self._held), drain_s)
        self._drain_ends_s = time.monotonic() + drain_s

    def _give_back_everything(self) -> None:
        """At the end: what is still held runs elsewhere."""
        try:
            for one in self._lifecycle.take_unanswered():
                self._held.hold(one)
            self._held.give_back_all()
            self._commit()
        except redis.RedisError as error:
            if not is_away(error):
                raise
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


def _kind(outcome: Outcome) -> _End:
    match outcome:
        case Succeeded():
            return "committed"
        case Failed() | Stopped():
            return "failed"
        case GivenBack():
            return "retried"
        case Superseded():
            raise AssertionError("what is superseded is always refused")
