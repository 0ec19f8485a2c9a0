"""The jobs a worker holds between claim and commit, and the outcomes it has yet to commit.

Invariant: a claimed job is either held or has exactly one outcome, until that is committed or the
job turns out not to be ours any more. It knows no Redis and no engine.
"""

from __future__ import annotations

from collections.abc import Callable

from shoal_worker.rq_lifecycle import Claimed, Failed, GivenBack, Outcome, abandoned


class HeldJobs:
    """Held jobs by id, their size in requests, and outcomes in the order they came."""

    def __init__(self) -> None:
        self._jobs: dict[str, Claimed] = {}
        self.outcomes: list[Outcome] = []
        self.num_requests = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __contains__(self, job_id: str) -> bool:
        return job_id in self._jobs

    @property
    def is_empty(self) -> bool:
        """Whether nothing is held and nothing is left to commit."""
        return not self._jobs and not self.outcomes

    def all(self) -> list[Claimed]:
        """The held jobs, longest held first."""
        return list(self._jobs.values())

    def hold(self, claimed: Claimed) -> None:
        """A job went to the engine."""
        self._jobs[claimed.id] = claimed
        self.num_requests += num_requests(claimed)

    def refuse(self, claimed: Claimed, reason: str) -> None:
        """A claimed job that must not run."""
        self.outcomes.append(Failed(claimed, reason))

    def end(self, job_id: str, outcome: Callable[[Claimed], Outcome]) -> None:
        """The engine has done with a job; what was dropped meanwhile is nobody's any more."""
        claimed = self.drop(job_id)
        if claimed is not None:
            self.outcomes.append(outcome(claimed))

    def drop(self, job_id: str) -> Claimed | None:
        """Forget a job that is not ours any more; None if it was forgotten before."""
        claimed = self._jobs.pop(job_id, None)
        if claimed is not None:
            self.num_requests -= num_requests(claimed)
        return claimed

    def give_back_all(self) -> None:
        """All held jobs go back to their queues."""
        for job_id in list(self._jobs):
            self.end(job_id, GivenBack)

    def abandon_all(self) -> None:
        """What ran them has died: all held jobs run again, those that die too often excepted."""
        for job_id in list(self._jobs):
            self.end(job_id, abandoned)


def num_requests(claimed: Claimed) -> int:
    """Sequences a job makes, as its meta says; 1 for a job of another client that does not."""
    meta: object = claimed.job.meta
    number = meta.get("requests", 1) if isinstance(meta, dict) else 1
    return number if isinstance(number, int) and number > 0 else 1
