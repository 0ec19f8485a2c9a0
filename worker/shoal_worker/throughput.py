"""What a heartbeat tells of a worker's speed: tokens a second lately, and the share of padding.

Owns two running figures made from step events. It knows no Prometheus and no Redis.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from threading import Lock

from shoal_worker.events import Event, StepRun

WINDOW_S = 10


class Throughput:
    """A subscriber that can be asked at any time, from any thread.

    Args:
        clock: seconds, of any beginning.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started_s = clock()
        self._tokens = 0
        self._padding_tokens = 0
        self._made = 0
        self._busy_s = 0.0
        self._seconds: deque[tuple[int, int]] = deque()  # (a full second, tokens made in it)
        self._lock = Lock()

    def __call__(self, event: Event) -> None:
        """Count a step; other events are none of its business."""
        if not isinstance(event, StepRun):
            return
        # A prefill makes the first token of each of its rows.
        made = event.tokens if event.phase == "decode" else event.rows
        second = int(self._clock())
        with self._lock:
            self._tokens += event.tokens
            self._padding_tokens += event.padding_tokens
            self._made += made
            self._busy_s += event.duration_s
            if self._seconds and self._seconds[-1][0] == second:
                made += self._seconds.pop()[1]
            self._seconds.append((second, made))
            while self._seconds[0][0] <= second - WINDOW_S:
                self._seconds.popleft()

    def tokens_per_s(self) -> float:
        """Mean tokens generated a second over the last 9 to 10 seconds, or since the start."""
        now_s = self._clock()
        first_second = int(now_s) - WINDOW_S + 1
        with self._lock:
            made = sum(tokens for second, tokens in self._seconds if second >= first_second)
        # Never less than a second: one step just after the start is not yet a speed.
        return made / max(1.0, now_s - max(self._started_s, first_second))

    def busy_tokens_per_s(self) -> float:
        """Mean tokens generated a second of step time since the start; 0 before the first step."""
        with self._lock:
            return self._made / self._busy_s if self._busy_s else 0.0

    def totals(self) -> tuple[int, int]:
        """Token positions computed since the start: for requests, and as padding."""
        with self._lock:
            return self._tokens, self._padding_tokens

    def padding_ratio(self) -> float:
        """Share of all token positions since the start that were computed for nothing, 0 to 1."""
        tokens, padding_tokens = self.totals()
        computed = tokens + padding_tokens
        return padding_tokens / computed if computed else 0.0
