"""Whether Redis answers, and how the worker lives through the time when it does not."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import redis

from shoal_worker.events import RedisRoundTrip, Subscriber

RETRY_S = 0.5
MAX_RETRY_S = 5.0
# Gone, silent, full, or a replica just now: in each case the same command may work later.
_AWAY = (
    redis.ConnectionError,
    redis.TimeoutError,
    redis.OutOfMemoryError,
    redis.ReadOnlyError,
)
# The same said in other words; inside a script they come wrapped, before Redis 7 also READONLY.
_AWAY_WORDS = (
    "MISCONF", "BUSY", "NOREPLICAS", "LOADING", "MASTERDOWN", "READONLY", "OOM", "UNKILLABLE",
    "CLUSTERDOWN", "TRYAGAIN",
)  # fmt: skip

log = logging.getLogger("shoal.worker")


def is_away(error: BaseException) -> bool:
    """Whether the same command may work later, when Redis is itself again."""
    if isinstance(error, _AWAY):
        return not isinstance(error, redis.AuthenticationError)
    is_reply = isinstance(error, redis.ResponseError)
    return is_reply and any(word in str(error) for word in _AWAY_WORDS)


class RedisWatch:
    """Keeps a fault of Redis from ending the worker, says so once, and times round trips.

    Args:
        emit: takes an event for each round trip.
        max_retry_s: the longest wait between two attempts.
    """

    def __init__(
        self,
        emit: Subscriber,
        max_retry_s: float = MAX_RETRY_S,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._emit = emit
        self._max_retry_s = max_retry_s
        self._sleep = sleep
        self._away_since_s: float | None = None
        self._retry_s = min(RETRY_S, max_retry_s)

    @property
    def is_away(self) -> bool:
        """Whether the last attempt failed."""
        return self._away_since_s is not None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Run a turn; if Redis fails in it, its rest is skipped and a moment waited."""
        try:
            yield
        except redis.RedisError as error:
            if not is_away(error):
                raise
            if self._away_since_s is None:
                self._away_since_s = time.monotonic()
                log.error("Redis fails; results are kept, nothing is claimed: %s", error)
            self._sleep(self._retry_s)
            self._retry_s = min(self._retry_s * 2, self._max_retry_s)
        else:
            if self._away_since_s is not None:
                log.warning(
                    "Redis answers again after %.1f s", time.monotonic() - self._away_since_s
                )
                self._away_since_s = None
                self._retry_s = min(RETRY_S, self._max_retry_s)

    @contextmanager
    def timed(self, command: str) -> Iterator[None]:
        """One round trip."""
        started_s = time.monotonic()
        failed = True
        try:
            yield
            failed = False
        finally:
            self._emit(RedisRoundTrip(command, time.monotonic() - started_s, failed))
