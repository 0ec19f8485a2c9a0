"""Gives held jobs to the engine and turns what it answers, or its death, into outcomes.

Owns which requests are with the engine and who is suspected of killing it. It knows no Redis: jobs
come in claimed, and leave as outcomes in `held`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from rq.utils import now

from shoal.wire import GenerationResult, ResultError
from shoal_worker.engine_link import EngineFailedError, EngineLink
from shoal_worker.events import EngineDied, RequestEnded, Subscriber
from shoal_worker.held_jobs import HeldJob, HeldJobs
from shoal_worker.messages import Cancel, JobDone, JobRefused, Submit
from shoal_worker.probation import Probation, Suspect
from shoal_worker.rq_outcomes import Claimed, DeadLetter, Failed, Stopped, Succeeded

RUN_ALONE_AFTER = 2  # Workers that died under a job; `recover.lua` counts them the same way.
MAX_FRUITLESS_JOBS = 3
KILLED_ENGINE = "killed_engine"

log = logging.getLogger("shoal.worker")


class Dispatcher:
    """Between the jobs that are held and the engine that runs them.

    Args:
        queues: most urgent first; a job's priority is its queue's place.
        emit: takes an event for each death, and for each request that is given up.
    """

    def __init__(
        self, engine: EngineLink, held: HeldJobs, queues: Sequence[str], emit: Subscriber
    ) -> None:
        self._engine = engine
        self._emit = emit
        self._held = held
        self._queues = queues
        self._probation = Probation()
        self._fruitless: list[str | None] = []  # None: it died with nothing to do.

    @property
    def takes_more(self) -> bool:
        """Whether new jobs may be claimed: none while it is found out who kills the engine."""
        return self._engine.ready is not None and self._probation.is_over

    @property
    def waiting_jobs(self) -> frozenset[str]:
        """Jobs that are held and not with the engine."""
        return self._probation.waiting_jobs

    def give(self, claimed: Claimed) -> None:
        """Run a job; alone, if workers have died under it."""
        if not self._held:
            self._engine.work_begins()
        if claimed.deaths >= RUN_ALONE_AFTER and self._probation.is_over:
            self._probation.begin(self._all_suspects())
            self._probation.add_group(_suspects(self._held.hold(claimed)))
        elif not self._probation.is_over:
            self._probation.add_group(_suspects(self._held.hold(claimed)))
        else:
            self._submit(self._held.hold(claimed), None)

    def next_group(self) -> list[Suspect]:
        """The suspects to `run` next, if it is their turn."""
        return self._probation.next_group() if self._engine.ready is not None else []

    def run(self, group: Sequence[Suspect]) -> None:
        """Give a group of suspects to the engine."""
        log.info("running %d requests apart from the others", len(group))
        self._engine.work_begins()
        indexes: dict[str, list[int]] = {}
        for suspect in group:
            of_job = indexes.setdefault(suspect.job_id, [])
            if suspect.request is not None:
                of_job.append(suspect.request)
        for job_id, some in indexes.items():
            if job_id in self._held:
                self._submit(self._held[job_id], tuple(some) or None)
            else:
                self._probation.clear(job_id)

    def done(self, message: JobDone) -> None:
        """The engine has results of a job."""
        self._fruitless.clear()
        if not self._is_current(message):
            return
        self._probation.clear(message.job_id, message.indexes)
        if message.indexes is None:
            self._held.end(message.job_id, lambda claimed: Succeeded(claimed, message.result))
        else:
            results = dict(zip(message.indexes, message.result["results"], strict=True))
            self._held.answer_part(message.job_id, results)

    def refused(self, message: JobRefused) -> None:
        """The engine does not understand a job."""
        if not self._is_current(message):
            return
        self._probation.clear(message.job_id)
        self._held.end(message.job_id, lambda claimed: Failed(claimed, message.reason))

    def drop(self, job_id: str) -> None:
        """A job is not ours any more."""
        self._held.drop(job_id)
        self._probation.clear(job_id)
        self._engine.tell(Cancel(job_id))

    def stop(self, job_id: str) -> None:
        """Somebody stops a job; one that is not held is somebody else's."""
        if job_id in self._held:
            self._held.end(job_id, Stopped)
            self._probation.clear(job_id)
            self._engine.tell(Cancel(job_id))

    def cancel_request(self, job_id: str, index: int) -> None:
        """Stop one request of a job, which then has an error for a result."""
        self._engine.tell(Cancel(job_id, index))

    def engine_died(self) -> None:
        """Whatever ran is not being made any more: find out who did it, by halves.

        Raises:
            EngineFailedError: it dies whatever it is given, so that it is not a request's fault.
        """
        if self._probation.is_over:
            self._probation.begin(self._all_suspects())
        had_none = self._probation.is_over
        was_split = self._probation.num_running > 1
        convicted = self._probation.engine_died()
        self._emit(EngineDied(self._engine.died_of_memory, was_split))
        self._held.begin_again()
        if convicted is None and not had_none:
            return
        # What kills an engine comes in many copies within a job. So a job counts once, and the
        # requests of others are asked next: if they are answered, the engine is sound.
        of_job = None if convicted is None else convicted.job_id
        if of_job is None or of_job not in self._fruitless:
            self._fruitless.append(of_job)
        if len(self._fruitless) > MAX_FRUITLESS_JOBS:
            raise EngineFailedError(
                f"the engine process {self._engine.last_death}, and so did those that ran "
                f"{MAX_FRUITLESS_JOBS} other jobs, or none, with nothing answered in between"
            )
        if convicted is not None:
            self._bury(convicted)
            self._probation.put_last(convicted.job_id)

    def _is_current(self, message: JobDone | JobRefused) -> bool:
        """Whether an answer is to the run that is held, not to an earlier job of the same id."""
        if message.job_id not in self._held:
            return False
        return self._held[message.job_id].claimed.execution.id == message.execution_id

    def _all_suspects(self) -> list[Suspect]:
        return [suspect for one in self._held.all() for suspect in _suspects(self._held[one.id])]

    def _submit(self, held: HeldJob, indexes: tuple[int, ...] | None) -> None:
        claimed = held.claimed
        job = claimed.job
        submitted = job.enqueued_at or job.created_at
        queued_s = max(0.0, (now() - submitted).total_seconds())
        # A job that somebody moved here from another queue keeps that one's name.
        known = claimed.queue in self._queues
        priority = self._queues.index(claimed.queue) if known else len(self._queues)
        args: Any = job.args
        meta: object = job.meta
        is_one = isinstance(args, list | tuple) and len(args) == 1 and not job.kwargs
        timeout_s: Any = job.timeout
        message = Submit(
            claimed.id,
            claimed.queue,
            args[0] if is_one else None,
            queued_s,
            priority,
            streams=isinstance(meta, dict) and bool(meta.get("stream")),
            indexes=indexes,
            limit_s=timeout_s if isinstance(timeout_s, int | float) and timeout_s > 0 else None,
            execution_id=claimed.execution.id,
        )
        try:
            self._engine.tell(message)
        except RecursionError:
            reason = "the job's argument is nested too deeply to be a GenerationJob"
            self.refused(JobRefused(claimed.id, reason, claimed.execution.id))

    def _bury(self, convicted: Suspect) -> None:
        """Give up on the request that kills the engine whenever it runs alone."""
        job_id, index = convicted
        if job_id not in self._held:
            return
        held = self._held[job_id]
        death = self._engine.last_death
        log.error("request %s of job %s kills the engine: it %s", index, job_id, death)
        reason = f"the engine process {death} each time it ran this request alone"
        self._emit(RequestEnded(held.claimed.queue, (), KILLED_ENGINE))
        if index is None or held.num_requests == 1:
            self._held.end(job_id, lambda claimed: Failed(claimed, reason))
            return
        request = held.claimed.job.args[0]["requests"][index]
        argument = {"v": 1, "requests": [request]}
        held.dead_letters.append(DeadLetter(f"{job_id}-{index}", argument, reason))
        self._held.answer_part(job_id, {index: self._error(job_id, index, request, reason)})

    def _error(self, job_id: str, index: int, request: Any, reason: str) -> dict[str, Any]:
        own_id = request.get("id") if isinstance(request, dict) else None
        served = self._engine.served
        return GenerationResult(
            id=own_id if isinstance(own_id, str) else f"{job_id}:{index}",
            model=served.model_name if served else "",
            fingerprint=served.fingerprint if served else "",
            error=ResultError(code=KILLED_ENGINE, message=reason, retryable=False),
        ).model_dump(mode="json")


def _suspects(held: HeldJob) -> list[Suspect]:
    if held.num_requests is None:
        return [Suspect(held.claimed.id, None)]
    missing = (i for i in range(held.num_requests) if i not in held.results)
    return [Suspect(held.claimed.id, index) for index in missing]
