"""A row's seed, from the run's seed and the row's index, so that anybody can make it again."""

from __future__ import annotations

_MASK_64 = 2**64 - 1
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15


def row_seed(run_seed: int, index: int) -> int:
    """63 bits: the (index + 1)-th output of SplitMix64 started at the mix of `run_seed`, halved.

    The run's seed is mixed first, or the rows of run 1 would be those of run 0 moved up by one for
    some pairs of seeds. Source: Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators
    (OOPSLA 2014), with the constants of `java.util.SplittableRandom`.
    """
    start = _mix(run_seed & _MASK_64)
    return _mix((start + (index + 1) * _GOLDEN_GAMMA) & _MASK_64) >> 1


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return z ^ (z >> 31)
