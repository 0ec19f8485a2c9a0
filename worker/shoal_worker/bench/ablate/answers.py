"""What a trial answers: one run's figures and completions, and what the run consists of.

Pure data, which travels between processes. Two arms that count alike are one arm, whatever they are
called.
"""

from __future__ import annotations

from dataclasses import dataclass, field

Metrics = dict[str, float]


@dataclass(frozen=True, slots=True)
class Run:
    """One run of the workload.

    Attributes:
        completions: token ids of each request, in order.
        others_ratio: share of the CPU that other processes used meanwhile.
    """

    metrics: Metrics
    completions: list[tuple[int, ...]] = field(default_factory=list)
    others_ratio: float = 0.0


@dataclass(frozen=True, slots=True)
class Counts:
    """A run's.

    Attributes:
        launched: operators with their inputs' dtypes and shapes.
        facts: what else can be told apart, by name.
        most_unread: calls of a lane that were launched and not read, at the most.
    """

    launched: dict[str, int]
    facts: dict[str, str]
    most_unread: int = 0

    @property
    def num_launched(self) -> int:
        """All operators."""
        return sum(self.launched.values())


def difference(on: Counts, off: Counts) -> str | None:
    """What differs, the plainest first; None where nothing does."""
    for name, fact in on.facts.items():
        if fact != off.facts.get(name):
            return f"{name}: {fact} and {off.facts.get(name)}"
    if on.num_launched != off.num_launched:
        return f"operators launched: {on.num_launched:,} and {off.num_launched:,}"
    names = sorted(on.launched.keys() | off.launched.keys())
    differing = [n for n in names if on.launched.get(n, 0) != off.launched.get(n, 0)]
    if differing:
        return f"{len(differing)} operators on other inputs, such as {differing[0]}"
    if on.most_unread != off.most_unread:
        return f"calls launched before one is read: {on.most_unread} and {off.most_unread}"
    return None
