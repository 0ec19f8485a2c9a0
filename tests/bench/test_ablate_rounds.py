"""Rounds: who runs when, and which runs count."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from threading import Barrier, BrokenBarrierError

import pytest

from shoal_worker.bench.ablate.answers import Run
from shoal_worker.bench.ablate.load import LOADS
from shoal_worker.bench.ablate.neighbours import Neighbours
from shoal_worker.bench.ablate.rounds import MAX_TRIES, for_each, in_rounds

LOAD = replace(LOADS["cpu", True], min_pairs=2, max_pairs=4, budget_s=1000)


@dataclass
class ScriptedRunner:
    """Writes its name into a log; its runs are disturbed as scripted."""

    name: str
    log: list[str]
    others: list[float] = field(default_factory=list)
    delay_s: float = 0.0

    def run(self) -> Run:
        self.log.append(self.name)
        time.sleep(self.delay_s)
        return Run({"number": len(self.log)}, [], self.others.pop(0) if self.others else 0.0)


def said(_: str) -> None:
    """Nobody listens."""


def test_every_other_round_goes_backwards_after_a_run_that_does_not_count() -> None:
    log: list[str] = []
    runners = {name: ScriptedRunner(name, log) for name in "ab"}

    runs = in_rounds(runners, LOAD, said)

    assert "".join(log) == "ab" + "abba" * 2
    assert [run.metrics["number"] for run in runs["a"]] == [3, 6, 7, 10]


def test_who_has_used_up_its_time_ends_after_the_least_rounds() -> None:
    log: list[str] = []
    runners = {name: ScriptedRunner(name, log) for name in "ab"}

    runs = in_rounds(runners, replace(LOAD, budget_s=0), said)

    assert [len(made) for made in runs.values()] == [2, 2]


def test_who_is_left_alone_ends_too() -> None:
    log: list[str] = []
    slow = ScriptedRunner("s", log, delay_s=0.02)
    runners = {"f": ScriptedRunner("f", log), "s": slow}

    runs = in_rounds(runners, replace(LOAD, budget_s=0.02), said)

    assert [len(made) for made in runs.values()] == [2, 2]


def test_a_disturbed_run_is_repeated_and_the_quietest_counts() -> None:
    log: list[str] = []
    noisy = ScriptedRunner("n", log, others=[0.0, 0.5, 0.02, *[0.9, 0.3, 0.8]])

    runs = in_rounds({"n": noisy}, replace(LOAD, max_pairs=2), said)

    assert [run.others_ratio for run in runs["n"]] == [0.02, 0.3]
    assert len(log) == 1 + 2 + MAX_TRIES


def test_one_s_own_work_is_not_a_neighbour_s() -> None:
    neighbours = Neighbours()
    total = sum(range(200_000))

    assert total > 0
    assert neighbours.ratio() >= 0


def test_what_is_not_timed_goes_on_side_by_side_where_the_load_says_so() -> None:
    both = Barrier(2)

    def meet(_: int) -> None:
        both.wait(timeout=0.5)

    for_each([1, 2], meet, replace(LOAD, side_by_side=True))
    with pytest.raises(BrokenBarrierError):
        for_each([1, 2], meet, LOAD)
