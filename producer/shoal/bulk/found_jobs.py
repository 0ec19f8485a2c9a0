"""Jobs that an earlier start of a run left in Redis, given their rows again as these are read.

Owns which job a row is in. A name tells first and last position only, so rows are matched from the
end: those at the front may be written already, and are not read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from shoal.bulk.job_names import JobName
from shoal.bulk.packing import PendingRow


@dataclass(slots=True)
class FoundJob:
    """A job of an earlier start.

    Attributes:
        rows: its rows from where the run goes on, in order; None for one that a later attempt has.
    """

    name: JobName
    rows: list[PendingRow | None] = field(default_factory=list)


class FoundJobs:
    """The found jobs whose rows are not all read yet."""

    def __init__(self, names: Iterable[JobName] = ()) -> None:
        # Of two jobs of a row the later attempt has it.
        self._jobs = sorted(map(FoundJob, names), key=lambda job: -job.name.attempt)

    def take(self, row: PendingRow) -> bool:
        """Whether one of these jobs has the row, which then counts as submitted with it."""
        holders = [j for j in self._jobs if j.name.first <= row.position <= j.name.last]
        for rank, job in enumerate(holders):
            job.rows.append(row if rank == 0 else None)
        if holders:
            row.attempts = holders[0].name.attempt
        return bool(holders)

    def complete(self, position: int) -> list[FoundJob]:
        """Hand out the jobs of which all rows lie before this position."""
        done = [job for job in self._jobs if job.name.last < position]
        if done:
            self._jobs = [job for job in self._jobs if job.name.last >= position]
        return done
