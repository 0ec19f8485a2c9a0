"""Ratios of interleaved pairs: their median, a bootstrap interval, and what to say of it.

Pure arithmetic; it knows neither what was measured nor how.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Literal, NamedTuple

CONFIDENCE = 0.95
RESAMPLES = 4000

Verdict = Literal["no effect", "as claimed", "less than claimed", "more than claimed", "opposite"]


class Interval(NamedTuple):
    """A ratio and the bounds of its confidence interval."""

    ratio: float
    low: float
    high: float

    @property
    def is_null(self) -> bool:
        """Whether nothing was found: the interval contains 1."""
        return self.low <= 1 <= self.high

    def inverted(self) -> Interval:
        """Of the inverse ratio: of a time as a speed."""
        return Interval(1 / self.ratio, 1 / self.high, 1 / self.low)


def paired_ratio(ons: Sequence[float], offs: Sequence[float], seed: int = 0) -> Interval:
    """The median of on / off over pairs that ran next to each other, with its interval.

    Pairs are drawn again with replacement, and the percentiles of the medians are the bounds
    (Efron's percentile bootstrap). A pair's ratio does not know of what drifts from pair to pair.

    Args:
        ons: one number a pair, over 0.
        offs: its partner's.
        seed: of the draws, so that equal numbers have equal bounds.
    """
    assert len(ons) == len(offs) >= 1, "a ratio is of pairs"
    ratios = [on / off for on, off in zip(ons, offs, strict=True)]
    draw = random.Random(seed)  # noqa: S311
    medians = sorted(median(draw.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES))
    cut = round(RESAMPLES * (1 - CONFIDENCE) / 2)
    return Interval(median(ratios), medians[cut], medians[-1 - cut])


def verdict(measured: Interval, claimed_low: float, claimed_high: float) -> Verdict:
    """A measured gain beside a claimed range; both are over 1 where there is a gain."""
    if measured.is_null:
        return "no effect"
    if measured.ratio < 1:
        return "opposite"
    if measured.high < claimed_low:
        return "less than claimed"
    return "more than claimed" if measured.low > claimed_high else "as claimed"


def steps(speeds: Sequence[float]) -> list[float]:
    """What each rung of a waterfall multiplies the one before it by; 1 for the first."""
    return [1.0, *(after / before for before, after in pairwise(speeds))]
