"""How fast a count has grown lately. Pure: time is a parameter."""

from __future__ import annotations

from collections import deque

WINDOW_S = 30.0
STEP_S = 1.0  # Between two points that are kept.


class Pace:
    """The mean growth of a count over the last `WINDOW_S` seconds, or since the first point."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()

    def per_s(self, now_s: float, count: int) -> float:
        """Take in what the count is now; 0 before there are two points."""
        points = self._points
        if not points or now_s - points[-1][0] >= STEP_S:
            points.append((now_s, count))
        while len(points) > 1 and points[1][0] <= now_s - WINDOW_S:
            points.popleft()
        since_s, before = points[0]
        return (count - before) / (now_s - since_s) if now_s > since_s else 0.0
