"""The life of many RQ jobs in one worker: claim, lease, commit, give back, recover.

Owns every exchange with Redis on behalf of a job. It knows nothing of text generation: what a job
does is somebody else's, and reaches this module as an outcome. What RQ writes at a job's end is
written by RQ's own code (see `rq_private`), run by a script only if the job is still ours.
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from importlib.resources import files
from typing import Any

from redis import Redis
from rq.defaults import RQ_KEY_PREFIX
from rq.exceptions import DeserializationError, NoSuchJobError
from rq.executions import Execution
from rq.job import Job
from rq.utils import utcformat
from rq.worker.base import BaseWorker

from shoal.jobs import EXPIRIES_KEY, cancel_key
from shoal_worker.rq_fence import SERVER_TROUBLE
from shoal_worker.rq_finish import enqueue_ready, finish_through_rq, needs_rq
from shoal_worker.rq_outcomes import (
    Claimed,
    Failed,
    GivenBack,
    Outcome,
    Recovered,
    Renewal,
    Room,
    Stopped,
    Succeeded,
    Superseded,
)
from shoal_worker.rq_private import (
    Command,
    dead_letter_commands,
    failure_commands,
    fetched_job,
    has_callbacks,
    requeue_commands,
    restored_job,
    started_execution,
    stopped_commands,
    success_commands,
    unreadable_commands,
)

log = logging.getLogger("shoal.worker")

LEASES_KEY = f"{RQ_KEY_PREFIX}:shoal:leases"
WIP_AHEAD_S = 3_600  # `rq info` and dashboards reap what RQ's own entry says is overdue.
CANCELLED_TTL_S = 86_400
MAX_IDS_PER_CLAIM = 256
MAX_JOBS_PER_RECOVERY = 1_024
MAX_JOBS_PER_COMMIT = 256
# Redis refuses a word of 512 MB and a request of 1 GB; long before that, others wait too long.
MAX_COMMIT_BYTES = 32 * 1024**2
MAX_RESULT_BYTES = 64 * 1024**2
MAX_WORKER_DEATHS = 5
MAX_TTL_S = 10**10  # Three centuries. Redis refuses an expiry beyond 64 bits of milliseconds.
DEATH_FIELDS = ("shoal_deaths", "shoal_died_at", "shoal_exposed")  # In the job's hash, beside RQ's.

_COMMITTED, _NEEDS_RQ = 1, 2  # What commit.lua says of a job; 0 is a refusal.


class Lifecycle:
    """Claims jobs, holds them, ends them.

    Args:
        worker: our registration with RQ; its queues are claimed from in their order, and its
            serializer reads their jobs.
        lease_s: a job whose lease is not renewed for so long runs again elsewhere.
        callbacks: run the callbacks that jobs bring along, and send their webhooks.

    Attributes:
        saw_nothing: whether the last claim looked through all queues and found nothing to take.
    """

    def __init__(self, worker: BaseWorker, *, lease_s: float, callbacks: bool = False) -> None:
        self.worker = worker
        self.lease_s = lease_s
        self._callbacks = callbacks
        self._redis: Redis = worker.connection
        self._answers_key = f"{RQ_KEY_PREFIX}:shoal:answers:{worker.name}"
        self._unanswered_claim: str | None = None
        self._left_out: list[int] = []  # Ids at the head of each queue that the last claim left.
        self.saw_nothing = False
        self._claim = self._script("claim")
        self._renew = self._script("renew")
        self._commit = self._script("commit")
        self._recover = self._script("recover")

    def claim(self, room: Room, fingerprint: str = "") -> list[Claimed]:
        """Take jobs for the free room, passing it by one job at most.

        Args:
            fingerprint: of what will run them; a job bound to another stays where it is.
        """
        now = datetime.now(UTC)
        is_repeated = self._unanswered_claim is not None
        claim_id = self._unanswered_claim or os.urandom(14).hex()
        self._unanswered_claim = claim_id
        queue_keys = self.worker.queue_keys()
        *claimed, (num_dropped, num_skipped, stopped_early, *left_out) = self._claim(
            keys=[LEASES_KEY, *queue_keys],
            args=[
                RQ_KEY_PREFIX,
                self.worker.name,
                room.requests,
                room.reserved,
                room.tokens,
                MAX_IDS_PER_CLAIM,
                self.lease_s,
                WIP_AHEAD_S,
                utcformat(now),
                claim_id,
                int(is_repeated),
                fingerprint,
                *(self._left_out or [0] * len(queue_keys)),
            ],
        )
        self._unanswered_claim = None
        self._left_out = left_out
        self.saw_nothing = not (claimed or stopped_early)
        if num_dropped:
            log.info("%d ids in the queues had no waiting job and were dropped", num_dropped)
        if num_skipped:
            log.debug("%d jobs are bound to another kind of worker and were left", num_skipped)
        jobs = (self._readable(now, *words) for words in claimed)
        return [job for job in jobs if job is not None]

    def take_unanswered(self) -> list[Claimed]:
        """The jobs of a claim whose reply was lost, if there was one; and no others."""
        return self.claim(Room(0, 0)) if self._unanswered_claim is not None else []

    def renew(
        self,
        claimed: Sequence[Claimed],
        waiting: frozenset[str] = frozenset(),
        *,
        only_look: bool = False,
    ) -> list[Renewal]:
        """Renew all leases in one round trip, and hear of cancellations in the same.

        Args:
            waiting: ids of jobs that do not run yet; our death would not be charged to them.
            only_look: hear of cancellations and leave the leases as they are.
        """
        if not claimed:
            return []
        args: list[Any] = [RQ_KEY_PREFIX, self.worker.name, self.lease_s, WIP_AHEAD_S]
        args += [CANCELLED_TTL_S, int(not only_look)]
        for one in claimed:
            args += [one.id, one.execution.id, one.queue, int(one.id not in waiting)]
        replies = self._renew(keys=[LEASES_KEY], args=args)
        return [
            Renewal(one, state.decode(), frozenset(int(i) for i in indexes if i.isdigit()))
            for one, (state, indexes) in zip(claimed, replies, strict=True)
        ]

    def commit(self, outcomes: Sequence[Outcome]) -> list[bool]:
        """End jobs in one round trip: as many of the first ones as fit into one request.

        Called again with the same outcomes, for want of a reply, it ends nothing twice.

        Returns:
            For each job that was tried, in order: False if it was not ours to end any more.
        """
        if not outcomes:
            return []
        chunk, words = self._chunk(outcomes)
        # Outcomes are told apart by execution, which no two claims share.
        digest = hashlib.sha1(usedforsecurity=False)
        for outcome in chunk:
            digest.update(f"{outcome.claimed.execution.id}{type(outcome).__name__}".encode())
        answers = self._commit(
            keys=[LEASES_KEY, EXPIRIES_KEY, self._answers_key],
            args=[RQ_KEY_PREFIX, self.worker.name, digest.hexdigest(), *words],
        )
        return [
            answer == _COMMITTED or (answer == _NEEDS_RQ and self._finish_through_rq(outcome))
            for outcome, answer in zip(chunk, answers, strict=True)
        ]

    def recover(self) -> list[Recovered]:
        """Put dead workers' jobs back to their queues; end those that keep losing their worker."""
        args = [
            RQ_KEY_PREFIX,
            self.worker.name,
            MAX_JOBS_PER_RECOVERY,
            MAX_WORKER_DEATHS,
            self.lease_s,
        ]
        recovered, condemned = [], []
        for job_id, execution_id, queue, fate in self._recover(keys=[LEASES_KEY], args=args):
            failed = fate == b"condemned"
            named = (job_id.decode(errors="replace"), queue.decode(errors="replace"))
            recovered.append(Recovered(*named, failed))
            if failed:
                condemned.append((job_id, execution_id, queue))
        for names in condemned:
            self._condemn(*names)
        enqueue_ready(self.worker)
        return recovered

    def _chunk(self, outcomes: Sequence[Outcome]) -> tuple[list[Outcome], list[Any]]:
        """The outcomes that go into one script call, and their words."""
        chunk: list[Outcome] = []
        words: list[Any] = []
        num_bytes = 0
        for outcome in outcomes[:MAX_JOBS_PER_COMMIT]:
            entry = self._entry(outcome)
            size = _num_bytes(entry)
            if isinstance(outcome, Succeeded) and size > MAX_RESULT_BYTES:
                reason = f"its result takes {size} bytes; a result may have {MAX_RESULT_BYTES}"
                log.error("job %s is failed: %s", outcome.claimed.id, reason)
                entry = self._entry(Failed(outcome.claimed, reason))
                size = _num_bytes(entry)
            num_bytes += size
            if chunk and num_bytes > MAX_COMMIT_BYTES:
                break
            chunk.append(outcome)
            words += entry
        return chunk, words

    def _entry(self, outcome: Outcome) -> list[Any]:
        claimed = outcome.claimed
        if needs_rq(outcome, callbacks=self._callbacks):
            return _words(claimed, "rq", [])
        if isinstance(outcome, GivenBack):
            return _words(claimed, "back", requeue_commands(self.worker, claimed))
        if isinstance(outcome, Superseded):
            return _words(claimed, "gone", [])
        try:
            commands = self._ending(outcome)
        except SERVER_TROUBLE:
            raise
        except Exception as error:  # noqa: BLE001
            # As in RQ, what it cannot finish has failed: be it that the group of a job whose result
            # is not kept is gone. Others end in the same call.
            return self._failed_entry(claimed, f"RQ cannot finish it: {type(error).__name__}")
        kept_s = claimed.job.get_result_ttl(0) if isinstance(outcome, Succeeded) else 0
        return _words(claimed, "end", commands, kept_s)

    def _failed_entry(self, claimed: Claimed, reason: str) -> list[Any]:
        log.error("job %s is failed: %s", claimed.id, reason)
        try:
            commands = self._ending(Failed(claimed, reason))
        except SERVER_TROUBLE:
            raise
        except Exception as error:  # noqa: BLE001
            # Nor can it fail it, be it for what was deleted meanwhile. The others end all the same.
            log.error("RQ cannot even fail job %s: %s", claimed.id, type(error).__name__)
            names = (claimed.queue, claimed.id, claimed.execution.id)
            commands = unreadable_commands(self.worker, *(name.encode() for name in names))
        return _words(claimed, "end", commands)

    def _ending(self, outcome: Succeeded | Failed | Stopped) -> list[Command]:
        match outcome:
            case Succeeded(claimed, value):
                commands = success_commands(self.worker, claimed, value)
            case Failed(claimed, reason):
                commands = failure_commands(self.worker, claimed, reason)
            case Stopped(claimed):
                commands = stopped_commands(self.worker, claimed)
        return [*commands, *self._along(outcome)]

    def _along(self, outcome: Outcome) -> list[Command]:
        """What this project writes at a job's end beside RQ."""
        claimed = outcome.claimed
        commands: list[Command] = []
        if claimed.deaths:
            # Whoever requeues it starts afresh.
            commands.append(("HDEL", claimed.job.key, *DEATH_FIELDS))
        if isinstance(outcome, Succeeded):
            for letter in outcome.dead_letters:
                commands += dead_letter_commands(self.worker, claimed, letter)
        return commands

    def _finish_through_rq(self, outcome: Outcome) -> bool:
        claimed = outcome.claimed
        lease = ("ZREM", LEASES_KEY, claimed.execution.composite_key)
        along = [*self._along(outcome), lease, ("DEL", cancel_key(claimed.id))]
        kept_s = claimed.job.get_result_ttl(0)
        if isinstance(outcome, Succeeded) and kept_s > 0:
            along.append(("ZADD", EXPIRIES_KEY, time.time() + kept_s, claimed.id))
        return finish_through_rq(self.worker, outcome, along, callbacks=self._callbacks)

    def _readable(
        self,
        now: datetime,
        execution_id: bytes,
        job_id: bytes,
        flat: list[bytes],
        requests: int,
        tokens: int,
    ) -> Claimed | None:
        fields = _pairs(flat)
        try:
            job = restored_job(self.worker, job_id.decode(), fields)
            _check_ttls(job)
            execution = self._execution(execution_id.decode(), job.id, now)
            deaths = _number(fields.get(b"shoal_deaths"))
            return Claimed(job, execution, requests, tokens, deaths)
        except Exception as error:  # noqa: BLE001
            # Whatever RQ trips over in a hash that somebody else wrote: one such job must not end
            # the worker, and the next one, and the next.
            queue = fields.get(b"origin", b"")
            log.error("job %r cannot be read and is failed: %s", job_id, error)
            self._discard(job_id, execution_id, queue)
            return None

    def _condemn(self, job_id: bytes, execution_id: bytes, queue: bytes) -> None:
        """Fail a job that has outlived too many workers to be trusted with another."""
        reason = f"it lost its worker {MAX_WORKER_DEATHS + 1} times within the hour"
        try:
            job = fetched_job(self.worker, job_id.decode())
            execution = self._execution(execution_id.decode(), job.id, datetime.now(UTC))
        except (ValueError, TypeError, NoSuchJobError, DeserializationError):
            self._discard(job_id, execution_id, queue)
        else:
            self.commit([Failed(Claimed(job, execution, deaths=MAX_WORKER_DEATHS + 1), reason)])

    def _discard(self, job_id: bytes, execution_id: bytes, queue: bytes) -> None:
        """Fail a job that RQ cannot even read."""
        commands = unreadable_commands(self.worker, queue, job_id, execution_id)
        entry = [job_id, execution_id, queue, 0, "end", len(commands), *_flat(commands)]
        self._commit(
            keys=[LEASES_KEY, EXPIRIES_KEY, self._answers_key],
            args=[RQ_KEY_PREFIX, self.worker.name, execution_id, *entry],
        )

    def _execution(self, execution_id: str, job_id: str, now: datetime) -> Execution:
        return started_execution(execution_id, job_id, self.worker.name, now, self._redis)

    def _script(self, name: str) -> Any:
        source = files("shoal_worker").joinpath("scripts", f"{name}.lua").read_text()
        return self._redis.register_script(source)


def refusal(claimed: Claimed, function_name: str, *, allow_callbacks: bool = False) -> str | None:
    """Why a claimed job must not run, or None: another function, or names to import."""
    try:
        func_name = claimed.job.func_name
    except DeserializationError:
        return "the job's data is not JSON; enqueue it with RQ's JSONSerializer"
    if func_name != function_name:
        return f"this worker runs {function_name} and nothing else; the job asks for {func_name}"
    if has_callbacks(claimed.job) and not allow_callbacks:
        return (
            "callbacks and webhooks are refused: they would run code or send requests from here; "
            "--allow-callbacks permits them"
        )
    return None


def _check_ttls(job: Job) -> None:
    """Refuse now what Redis would refuse at the job's end, and with it the ends of other jobs."""
    for name, ttl_s in (("result_ttl", job.result_ttl), ("failure_ttl", job.failure_ttl)):
        if ttl_s is not None and ttl_s > MAX_TTL_S:
            raise ValueError(f"its {name} is {ttl_s} s; {MAX_TTL_S} s is the most")


def _words(claimed: Claimed, way: str, commands: list[Command], kept_s: int = 0) -> list[Any]:
    """One job's part of the commit script's arguments."""
    named = [claimed.id, claimed.execution.id, claimed.queue]
    return [*named, kept_s, way, len(commands), *_flat(commands)]


def _flat(commands: Iterable[Command]) -> list[Any]:
    return [word for command in commands for word in (len(command), *command)]


def _num_bytes(words: Iterable[Any]) -> int:
    # A few bytes at the most for each number; a character may take more than one.
    return sum([len(word) for word in words if type(word) in (str, bytes)])


def _number(text: bytes | None) -> int:
    return int(text) if text is not None and text.isdigit() else 0


def _pairs(flat: Iterable[bytes]) -> dict[bytes, bytes]:
    words = list(flat)
    return dict(zip(words[::2], words[1::2], strict=True))
