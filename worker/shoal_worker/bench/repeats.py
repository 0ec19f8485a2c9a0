"""What repeated measurements come to: medians, and ratios of those that ran next to each other.

Pure arithmetic. A ratio is taken in each round and not of medians: what drifts from round to round
(a processor's clock, a neighbour) is in both of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median


@dataclass(frozen=True, slots=True)
class Repeats:
    """One figure, measured in each round.

    Attributes:
        values: in the order of the rounds.
    """

    median: float
    lowest: float
    highest: float
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Repeats:
        """From at least one value."""
        return cls(median(values), min(values), max(values), tuple(values))


def ratio(above: Repeats, below: Repeats) -> Repeats:
    """`above` / `below`, round by round.

    Args:
        above: of the same rounds as `below`, whose values are over 0.
    """
    pairs = zip(above.values, below.values, strict=True)
    return Repeats.of([numerator / denominator for numerator, denominator in pairs])


def in_turns(names: Sequence[str], num_rounds: int) -> list[tuple[int, str]]:
    """Who runs when: (round, name); every other round backwards, so that none is always first."""
    return [
        (number, name)
        for number in range(num_rounds)
        for name in (names if number % 2 == 0 else tuple(reversed(names)))
    ]
