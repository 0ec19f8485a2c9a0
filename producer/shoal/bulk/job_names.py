"""The id of a run's job: it follows from the run, the rows in it and the attempt.

So a run that goes on recognises what an earlier start of it has submitted, and a job that is sent
twice is there once.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass

from shoal.jobs import RUN_KEY_PREFIX

_PATTERN = re.compile(r"bulk-([0-9a-f]+)-(\d+)-(\d+)-(\d+)")


@dataclass(frozen=True, slots=True)
class JobName:
    """A job of a run: all rows from position `first` to `last` that can be generated from.

    Attributes:
        attempt: of its rows, from 1.
    """

    run_id: str
    first: int
    last: int
    attempt: int

    def __str__(self) -> str:
        return f"bulk-{self.run_id}-{self.first}-{self.last}-{self.attempt}"

    @classmethod
    def parse(cls, job_id: str) -> JobName | None:
        """The name that a job id is; None if it is no job's of a run."""
        match = _PATTERN.fullmatch(job_id)
        if match is None:
            return None
        run_id, *numbers = match.groups()
        return cls(run_id, *map(int, numbers))


def new_run_id() -> str:
    """A name that no other run has."""
    return secrets.token_hex(8)


def jobs_key(run_id: str) -> str:
    """The key of the set of a run's jobs, each in it from its submission until it is forgotten."""
    return f"{RUN_KEY_PREFIX}:{run_id}:jobs"
