"""Rounds of several processes in turn, so that whatever drifts meets them all alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

from shoal_worker.bench.ablate.answers import Run
from shoal_worker.bench.ablate.load import Load

MAX_OTHERS_RATIO = 0.1
MAX_TRIES = 3

Key = TypeVar("Key")
Item = TypeVar("Item")
Say = Callable[[str], None]


class Runs(Protocol):
    """What can be asked for a run."""

    def run(self) -> Run:
        """One, now."""
        ...


def in_rounds(runners: Mapping[Key, Runs], load: Load, say: Say) -> dict[Key, list[Run]]:
    """The runs of each, by round: all begin with the first, slow ones end sooner.

    One run of each goes before and is not counted. Every other round goes through them backwards.
    Who is left alone ends as well: its runs would have nothing to be compared with.
    """
    for_each(runners.values(), lambda runner: runner.run(), load)
    runs: dict[Key, list[Run]] = {key: [] for key in runners}
    spent_s = dict.fromkeys(runners, 0.0)
    for number in range(load.max_pairs):
        say(f"round {number + 1} of {load.max_pairs}")
        order = list(runners) if number % 2 == 0 else list(reversed(list(runners)))
        is_early = number < load.min_pairs
        # Who has sat out a round has no partner in the next.
        at_work = [
            key
            for key in order
            if len(runs[key]) == number and (is_early or spent_s[key] < load.budget_s)
        ]
        if len(at_work) == 1 < len(runners):
            break
        for key in at_work:
            started_s = time.monotonic()
            runs[key].append(_undisturbed(runners[key]))
            spent_s[key] += time.monotonic() - started_s
    return runs


def for_each(items: Iterable[Item], do: Callable[[Item], object], load: Load) -> None:
    """Have something done that is not timed; it waits for a process of the item's."""
    items = list(items)
    with ThreadPoolExecutor(len(items) if load.side_by_side else 1) as pool:
        for done in [pool.submit(do, item) for item in items]:
            done.result()


def _undisturbed(runner: Runs) -> Run:
    """A run that other processes left alone, or the one of a few that they disturbed least."""
    runs: list[Run] = []
    while len(runs) < MAX_TRIES:
        runs.append(runner.run())
        if runs[-1].others_ratio <= MAX_OTHERS_RATIO:
            break
    return min(runs, key=lambda run: run.others_ratio)
