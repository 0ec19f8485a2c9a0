"""A job in a worker's hands, and the ways in which its time there ends.

Plain values between the lifecycle, which writes them to Redis, and whoever runs the jobs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rq.executions import Execution
from rq.job import Job


@dataclass(frozen=True, slots=True)
class Room:
    """What a worker can take on: requests, and tokens of prompts and completions.

    Attributes:
        reserved: requests that the first queue may add whatever the others have taken.
    """

    requests: int
    tokens: int
    reserved: int = 0

    @property
    def is_none(self) -> bool:
        """Whether not one request may be added."""
        return self.reserved <= 0 and (self.requests <= 0 or self.tokens <= 0)


@dataclass(frozen=True, slots=True)
class Claimed:
    """A job that is ours: started in RQ's eyes, and under our lease.

    Attributes:
        requests, tokens: its size, as its meta says.
        deaths: workers that died while it ran in them, within the last hour.
    """

    job: Job
    execution: Execution
    requests: int = 1
    tokens: int = 0
    deaths: int = 0

    @property
    def id(self) -> str:
        """The RQ job's id."""
        return str(self.job.id)

    @property
    def queue(self) -> str:
        """The queue it came from."""
        return str(self.job.origin)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A new failed job for a part of a job that finishes without it.

    Attributes:
        argument: what the new job would be called with, were it requeued.
    """

    job_id: str
    argument: Any
    reason: str


@dataclass(frozen=True, slots=True)
class Succeeded:
    """The job returned this JSON value; parts that could not be run are left behind as failed."""

    claimed: Claimed
    return_value: Any
    dead_letters: tuple[DeadLetter, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The job failed for this reason; for good, unless its own retries are to be spent on it.

    Attributes:
        error: what it raised, for its callback, if it ran in this process.
    """

    claimed: Claimed
    reason: str
    may_retry: bool = False
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Stopped:
    """Somebody stopped the job."""

    claimed: Claimed


@dataclass(frozen=True, slots=True)
class GivenBack:
    """The job goes back to the front of its queue as if it had not been taken."""

    claimed: Claimed


@dataclass(frozen=True, slots=True)
class Superseded:
    """Somebody requeued the job under us and we claimed it again: this execution is nobody's."""

    claimed: Claimed


Outcome = Succeeded | Failed | Stopped | GivenBack | Superseded


@dataclass(frozen=True, slots=True)
class Renewal:
    """What a lease's renewal said of one job."""

    claimed: Claimed
    state: Literal["held", "cancelled", "lost"]
    cancelled_requests: frozenset[int]


@dataclass(frozen=True, slots=True)
class Recovered:
    """A job found without a living worker, and what was done with it."""

    job_id: str
    queue: str
    failed: bool
