"""How fast a count grows: lately, not since ever."""

from __future__ import annotations

from shoal.bulk.pace import Pace


def test_nothing_is_known_of_one_point() -> None:
    assert Pace().per_s(5.0, 100) == 0.0


def test_what_was_long_ago_does_not_count() -> None:
    pace = Pace()
    for second in range(100):
        slow = pace.per_s(second, second)
    for second in range(100, 200):
        fast = pace.per_s(second, 100 + 10 * (second - 100))

    assert slow == 1.0
    assert fast == 10.0
