"""What the worker process and its engine process say to each other over their pipe."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from shoal_worker.events import Event


@dataclass(frozen=True, slots=True)
class Submit:
    """Generate for this job.

    Attributes:
        job: the GenerationJob as it came over the wire, not yet validated.
        queued_s: seconds it has waited since submission.
        priority: smaller is served first.
        streams: whether text is wanted as it is made.
        indexes: run these requests of it alone; all where it is None.
        limit_s: seconds that each request may take from its prefill on.
        execution_id: of the claim; the answer repeats it, since a job's id may be used again.
    """

    job_id: str
    queue: str
    job: Any
    queued_s: float
    priority: int
    streams: bool = False
    indexes: tuple[int, ...] | None = None
    limit_s: float | None = None
    execution_id: str = ""


@dataclass(frozen=True, slots=True)
class Cancel:
    """Stop a request of a job, or (index None) all of them and answer nothing."""

    job_id: str
    index: int | None = None


@dataclass(frozen=True, slots=True)
class Shutdown:
    """Leave now."""


@dataclass(frozen=True, slots=True)
class Ready:
    """The engine serves; what it is and how much it takes.

    Attributes:
        num_positions: tokens that the caches of all slots hold.
    """

    model_name: str
    fingerprint: str
    device: str
    dtype: str
    num_slots: int
    lanes: dict[str, int]
    load_s: float
    num_positions: int = 0


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The engine will never serve, for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class JobDone:
    """A job's results, as the JSON that goes into Redis.

    Attributes:
        indexes: the requests that these are the results of; all of the job's where it is None.
    """

    job_id: str
    result: dict[str, Any]
    indexes: tuple[int, ...] | None = None
    execution_id: str = ""


@dataclass(frozen=True, slots=True)
class JobRefused:
    """A job whose argument is not a GenerationJob."""

    job_id: str
    reason: str
    execution_id: str = ""


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of the first completion of a job that streams, and where in it that belongs."""

    job_id: str
    text: str
    at: int


@dataclass(frozen=True, slots=True)
class Dying:
    """The engine cannot go on, for this reason, and leaves."""

    reason: str
    out_of_memory: bool = False


@dataclass(frozen=True, slots=True)
class Observed:
    """Events for the subscribers; also a sign that the engine makes progress."""

    events: tuple[Event, ...]


ToEngine = Submit | Cancel | Shutdown
FromEngine = Ready | LoadFailed | JobDone | JobRefused | TextDelta | Dying | Observed
