"""How much of what the workers computed, while a command watched, was padding. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from shoal.status import WorkerState


class PaddingCount:
    """Positions computed by a set of workers that may change, since each was first seen."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[int, int]] = {}
        self._last: dict[str, tuple[int, int]] = {}
        self._ratios: list[float] = []

    def look(self, workers: Iterable[WorkerState]) -> None:
        """Take in what the workers tell now; one that is gone keeps its count."""
        self._ratios = []
        for worker in workers:
            if worker.padding_ratio is not None:
                self._ratios.append(worker.padding_ratio)
            if worker.tokens is not None and worker.padding_tokens is not None:
                self._last[worker.name] = (worker.tokens, worker.padding_tokens)
                self._first.setdefault(worker.name, self._last[worker.name])

    @property
    def num_padding(self) -> int:
        """Positions computed for nothing."""
        return self._grown(1)

    @property
    def ratio(self) -> float | None:
        """The share of padding; what workers tell of their whole life before they computed any."""
        computed = self._grown(0) + self.num_padding
        if computed:
            return self.num_padding / computed
        return sum(self._ratios) / len(self._ratios) if self._ratios else None

    def _grown(self, index: int) -> int:
        return sum(last[index] - self._first[name][index] for name, last in self._last.items())
