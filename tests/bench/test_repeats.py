"""Medians, and ratios of what ran next to each other."""

from __future__ import annotations

import pytest

from shoal_worker.bench.repeats import Repeats, in_turns, ratio


def test_repeats_keep_their_values_and_know_their_middle_and_ends() -> None:
    repeats = Repeats.of([3.0, 1.0, 8.0])

    assert repeats == Repeats(3.0, 1.0, 8.0, (3.0, 1.0, 8.0))


def test_a_ratio_is_taken_round_by_round() -> None:
    # The machine slows to a third; the ratio of medians would be 0.9 / 1.0 of other rounds.
    ours, theirs = Repeats.of([90.0, 60.0, 30.0]), Repeats.of([100.0, 50.0, 30.0])

    assert ratio(ours, theirs).values == pytest.approx((0.9, 1.2, 1.0))
    assert ratio(ours, theirs).median == pytest.approx(1.0)


def test_ratios_of_unequal_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio(Repeats.of([1.0, 2.0]), Repeats.of([1.0]))


def test_every_other_round_runs_backwards() -> None:
    assert in_turns(["a", "b"], 3) == [
        *((0, "a"), (0, "b")),
        *((1, "b"), (1, "a")),
        *((2, "a"), (2, "b")),
    ]
