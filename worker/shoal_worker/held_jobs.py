"""The jobs a worker holds between claim and commit, and the outcomes it has yet to commit.

Invariant: a claimed job is either held or has exactly one outcome, until that is committed or the
job turns out not to be ours any more. It knows no Redis and no engine.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from shoal_worker.rq_outcomes import (
    Claimed,
    DeadLetter,
    Failed,
    GivenBack,
    Outcome,
    Succeeded,
    Superseded,
)


@dataclass(slots=True)
class HeldJob:
    """A job, and the results of those of its requests that have been run apart from the others.

    Attributes:
        num_requests: in its argument; None where that is no GenerationJob.
        num_ended: of the completions that it was claimed with, those that need no more room.
    """

    claimed: Claimed
    num_requests: int | None
    num_ended: int = 0
    results: dict[int, Any] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)

    @property
    def num_open(self) -> int:
        """Completions that have not ended."""
        return self.claimed.requests - self.num_ended

    @property
    def num_open_tokens(self) -> int:
        """The tokens of those."""
        return self.claimed.tokens * self.num_open // self.claimed.requests


class HeldJobs:
    """Held jobs by id, their size, and outcomes in the order they came.

    Attributes:
        num_requests: of all held jobs, each completion counted as one, as their meta does.
        num_open, num_open_tokens: of those the ones that have not ended, and their tokens.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, HeldJob] = {}
        self._outcomes: list[Outcome] = []
        self._committing: list[Outcome] = []
        self.num_requests = 0
        self.num_open = 0
        self.num_open_tokens = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    def __getitem__(self, job_id: str) -> HeldJob:
        return self._jobs[job_id]

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held and nothing is left to commit."""
        return not (self._jobs or self._outcomes or self._committing)

    def all(self) -> list[Claimed]:
        """The held jobs, longest held first."""
        return [held.claimed for held in self._jobs.values()]

    def leased(self) -> list[Claimed]:
        """All jobs whose lease must not run out: held, or ended and not yet committed."""
        ended = [outcome.claimed for outcome in (*self._committing, *self._outcomes)]
        return [*self.all(), *ended]

    def num_open_of(self, queue: str) -> int:
        """Those of one queue's jobs that have not ended."""
        return sum(one.num_open for one in self._jobs.values() if one.claimed.queue == queue)

    def hold(self, claimed: Claimed) -> HeldJob:
        """A job is ours to run; where it was before, that execution ends without a result."""
        self.end(claimed.id, Superseded)
        held = HeldJob(claimed, _num_requests(claimed))
        self._jobs[claimed.id] = held
        self.num_requests += claimed.requests
        self._count(held, 1)
        return held

    def request_ended(self, job_id: str, num_completions: int) -> None:
        """One request of a job has its result, so its completions need no more room."""
        held = self._jobs.get(job_id)
        if held is None:
            return
        self._count(held, -1)
        # The last one's room is freed with its job.
        held.num_ended += min(max(1, num_completions), held.num_open - 1)
        self._count(held, 1)

    def begin_again(self) -> None:
        """The engine died: what had ended in it has not."""
        for held in self._jobs.values():
            self._count(held, -1)
            held.num_ended = min(len(held.results), held.claimed.requests - 1)
            self._count(held, 1)

    def refuse(self, claimed: Claimed, reason: str) -> None:
        """A claimed job that must not run."""
        self._outcomes.append(Failed(claimed, reason))

    def end(self, job_id: str, outcome: Callable[[Claimed], Outcome]) -> None:
        """A job has ended; what was dropped meanwhile is nobody's any more."""
        claimed = self.drop(job_id)
        if claimed is not None:
            self._outcomes.append(outcome(claimed))

    def answer_part(self, job_id: str, results: dict[int, Any]) -> None:
        """Some requests of a job have their results; the job ends with its last one."""
        held = self._jobs.get(job_id)
        if held is None:
            return
        held.results |= results
        if len(held.results) == held.num_requests:
            whole = {"v": 1, "results": [held.results[i] for i in sorted(held.results)]}
            letters = tuple(held.dead_letters)
            self.end(job_id, lambda claimed: Succeeded(claimed, whole, letters))

    def runs(self, claimed: Claimed) -> bool:
        """Whether the job is held, and in this execution."""
        held = self._jobs.get(claimed.id)
        return held is not None and held.claimed.execution.id == claimed.execution.id

    def drop(self, job_id: str) -> Claimed | None:
        """Forget a job that is not ours any more; None if it was forgotten before."""
        held = self._jobs.pop(job_id, None)
        if held is None:
            return None
        self.num_requests -= held.claimed.requests
        self._count(held, -1)
        return held.claimed

    def _count(self, held: HeldJob, sign: int) -> None:
        self.num_open += sign * held.num_open
        self.num_open_tokens += sign * held.num_open_tokens

    def give_back_all(self) -> None:
        """All held jobs go back to their queues, the last one first: each goes to the front."""
        for job_id in reversed(list(self._jobs)):
            self.end(job_id, GivenBack)

    def to_commit(self) -> list[Outcome]:
        """The outcomes to commit next: the same ones until they are `committed`."""
        if not self._committing:
            self._committing, self._outcomes = self._outcomes, []
        return self._committing

    def committed(self, num_outcomes: int) -> None:
        """So many of the first outcomes are committed."""
        del self._committing[:num_outcomes]


def _num_requests(claimed: Claimed) -> int | None:
    args: Any = claimed.job.args
    argument = args[0] if isinstance(args, list | tuple) and args else None
    requests = argument.get("requests") if isinstance(argument, dict) else None
    return len(requests) if isinstance(requests, list) and requests else None
