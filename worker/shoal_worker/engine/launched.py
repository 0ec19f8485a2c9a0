"""Tokens that were launched and not yet read, in the order of their launch.

Owns what is on its way from the device and whose it is. Knows no model and no scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache

from shoal_worker.engine.plan import Reports
from shoal_worker.engine.transfer import ToHost
from shoal_worker.sequence import SampledToken, Sequence

# A token without log-probabilities is the same in every row.
_plain = lru_cache(maxsize=None)(SampledToken)


@dataclass(frozen=True, slots=True)
class Launched:
    """One call's tokens.

    Attributes:
        tokens: `[steps, slots]`, every slot's token after each step.
        planned_slots: of the rows that `reports` speaks of.
        reports: the log-probabilities of each step.
        spent: sequences of which nothing is launched after it.
    """

    slots: list[int]
    sequences: list[Sequence]
    tokens: ToHost
    planned_slots: tuple[int, ...]
    reports: list[Reports | None]
    spent: list[Sequence] = field(default_factory=list)

    def read(self) -> Iterator[tuple[Sequence, list[SampledToken]]]:
        """Each sequence's tokens; waits for the device."""
        columns: list[list[int]] = self.tokens.get().T.tolist()
        found = [{} if reports is None else reports.get() for reports in self.reports]
        if not any(found):
            for slot, sequence in zip(self.slots, self.sequences, strict=True):
                yield sequence, list(map(_plain, columns[slot]))
            return
        places = {slot: place for place, slot in enumerate(self.planned_slots)}
        for slot, sequence in zip(self.slots, self.sequences, strict=True):
            column = columns[slot]
            if (place := places.get(slot)) is None:
                yield sequence, [_plain(token_id) for token_id in column]
            else:
                reported = zip(column, found, strict=True)
                yield sequence, [SampledToken(t, of_step.get(place)) for t, of_step in reported]


class LaunchQueue:
    """What a lane has launched and nobody has read."""

    def __init__(self) -> None:
        self._launched: deque[Launched] = deque()
        self._unread: dict[Sequence, list[SampledToken]] = {}

    def __len__(self) -> int:
        """Calls that nobody has read."""
        return len(self._launched)

    def add(self, launched: Launched) -> None:
        """Launched after all that is here."""
        self._launched.append(launched)
        for sequence in launched.sequences:
            self._unread.setdefault(sequence, [])

    def forget(self, sequence: Sequence) -> None:
        """Nobody wants this one's tokens any more."""
        self._unread.pop(sequence, None)

    def has_arrived(self, num_left: int) -> bool:
        """Whether all launches but the last `num_left` can be read without waiting."""
        place = len(self._launched) - 1 - num_left
        return place < 0 or self._launched[place].tokens.has_arrived()

    def read(self, sequences: list[Sequence], num_left: int) -> list[list[SampledToken]]:
        """The unread tokens of these sequences, from all launches but the last `num_left`."""
        spent: list[Sequence] = []
        while len(self._launched) > num_left:
            launched = self._launched.popleft()
            for sequence, tokens in launched.read():
                if (unread := self._unread.get(sequence)) is not None:
                    unread.extend(tokens)
            spent += launched.spent
        read = []
        for sequence in sequences:
            fresh = self._unread.get(sequence)
            read.append(fresh or [])
            if fresh:
                self._unread[sequence] = []
        for sequence in spent:
            self.forget(sequence)
        return read
