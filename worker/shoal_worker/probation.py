"""Which request kills the engine: suspects run in ever smaller groups until one has run alone.

Pure bookkeeping. It knows no engine, no Redis and no clock; whoever uses it runs the groups and
says what became of them.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from typing import NamedTuple

# Fewer may be chance: a signal from outside, the kernel short of memory. Of 500 random kills, two
# struck one innocent request.
LONELY_DEATHS = 3


class Suspect(NamedTuple):
    """A request of a held job; a whole job (None) where its requests cannot be told apart."""

    job_id: str
    request: int | None


class Probation:
    """Groups of suspects, one of which runs at a time.

    Invariant: a suspect is in the running group, in one waiting group, or cleared and forgotten.
    """

    def __init__(self) -> None:
        self._running: list[Suspect] = []
        self._waiting: deque[list[Suspect]] = deque()
        self._lonely_deaths: Counter[Suspect] = Counter()

    @property
    def is_over(self) -> bool:
        """Whether nobody is under suspicion."""
        return not (self._running or self._waiting)

    @property
    def num_running(self) -> int:
        """Suspects that run now."""
        return len(self._running)

    @property
    def waiting_jobs(self) -> frozenset[str]:
        """Jobs none of whose suspects is running."""
        running = {suspect.job_id for suspect in self._running}
        return frozenset(s.job_id for group in self._waiting for s in group) - running

    def begin(self, running: Iterable[Suspect]) -> None:
        """These run at this moment; nothing else may from now on."""
        assert self.is_over, "a probation ends before the next begins"
        self._running = list(running)

    def add_group(self, group: Iterable[Suspect]) -> None:
        """Let suspects wait until they can run among themselves."""
        self._waiting.append(list(group))

    def next_group(self) -> list[Suspect]:
        """The group to run now; nothing while another runs or when none is left."""
        if self._running or not self._waiting:
            return []
        self._running = self._waiting.popleft()
        return list(self._running)

    def engine_died(self) -> Suspect | None:
        """Draw the conclusion from a death: halves to run next, or the one that did it."""
        died, self._running = self._running, []
        if len(died) > 1:
            middle = len(died) // 2
            self._waiting.extendleft([died[middle:], died[:middle]])
            return None
        for suspect in died:
            self._lonely_deaths[suspect] += 1
            if self._lonely_deaths[suspect] >= LONELY_DEATHS:
                del self._lonely_deaths[suspect]
                return suspect
            self._waiting.appendleft(died)
        return None

    def put_last(self, job_id: str) -> None:
        """Let the suspects of all other jobs run before this job's."""
        others = [[s for s in group if s.job_id != job_id] for group in self._waiting]
        of_job = [[s for s in group if s.job_id == job_id] for group in self._waiting]
        self._waiting = deque(group for group in (*others, *of_job) if group)

    def clear(self, job_id: str, indexes: Iterable[int] | None = None) -> None:
        """These requests of a job, or the whole job, have their result or are gone."""
        gone = None if indexes is None else set(indexes)

        def stays(suspect: Suspect) -> bool:
            return suspect.job_id != job_id or not (gone is None or suspect.request in gone)

        self._running = [suspect for suspect in self._running if stays(suspect)]
        groups = ([suspect for suspect in group if stays(suspect)] for group in self._waiting)
        self._waiting = deque(group for group in groups if group)
        for suspect in [s for s in self._lonely_deaths if not stays(s)]:
            del self._lonely_deaths[suspect]
