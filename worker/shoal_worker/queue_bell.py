"""When to look for jobs: at once when a queue that was empty has one, else hardly ever.

A look costs half a millisecond of CPU: thirty a second are over a percent of a core. So one thread
for each queue waits in Redis, by BLMOVE of the list's head onto itself, which blocks while the list
is empty and changes nothing when it is not. It takes nothing: the claim does.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Sequence
from threading import Event, Thread

import redis

BLOCK_S = 1  # Under the time-out of the client's sockets.
LOOK_S = 0.5  # Without any sign, in case one was missed.

log = logging.getLogger("shoal.worker")


class QueueBell:
    """Says when a claim may find something.

    Args:
        client: with a connection for each queue.
        keys: of the queues' lists.
        poll_s: between two looks at a queue that holds nothing for us, and where Redis does not let
            us wait.

    Attributes:
        fd: becomes readable when a queue has something in it.
    """

    def __init__(self, client: redis.Redis, keys: Sequence[str], poll_s: float) -> None:
        self._client = client
        self._poll_s = poll_s
        self.fd, self._write_fd = os.pipe()
        os.set_blocking(self.fd, False)
        os.set_blocking(self._write_fd, False)
        self._works = True
        self._closing = False
        self._found_last = True
        self._is_armed = False
        self._armed_s = float("-inf")
        self._next_look_s = float("-inf")
        self._blocked: dict[str, int] = {}  # Ids of the connections that wait, by key.
        self._armed = {key: Event() for key in keys}
        self._threads = [
            Thread(target=self._wait, args=(key,), name=f"bell {key}", daemon=True) for key in keys
        ]
        for thread in self._threads:
            thread.start()

    @property
    def has_backlog(self) -> bool:
        """Whether the last claim found something, so that there may be more."""
        return self._found_last

    def should_look(self) -> bool:
        """Whether a claim is worth its while now."""
        now_s = time.monotonic()
        if self._found_last or self._has_rung() or now_s >= self._next_look_s:
            return True
        if not self._is_armed and now_s >= self._armed_s + self._poll_s:
            self._arm(now_s)
        return False

    def looked(self, *, found: bool) -> None:
        """A claim has found something, or nothing."""
        self._found_last = found
        period_s = LOOK_S if self._works else self._poll_s
        self._next_look_s = time.monotonic() + period_s

    def wait_s(self) -> float:
        """How long `fd` may be waited for before `should_look` is asked again."""
        return LOOK_S if self._is_armed and self._works else self._poll_s

    def close(self) -> None:
        """Stop waiting."""
        self._closing = True
        for armed in self._armed.values():
            armed.set()
        # Not allowed, or not reached: the threads end with their time-out.
        with contextlib.suppress(redis.RedisError):
            for client_id in list(self._blocked.values()):
                self._client.client_unblock(client_id)
        for thread in self._threads:
            thread.join(2 * BLOCK_S)
        os.close(self.fd)
        os.close(self._write_fd)
        self._client.close()

    def _arm(self, now_s: float) -> None:
        self._has_rung()  # What it said before is old.
        self._is_armed = self._works
        self._armed_s = now_s
        for armed in self._armed.values():
            armed.set()

    def _has_rung(self) -> bool:
        try:
            rung = bool(os.read(self.fd, 4096))
        except BlockingIOError:
            return False
        self._is_armed = False
        return rung

    def _wait(self, key: str) -> None:
        """A queue's thread: ring once each time it is armed."""
        armed = self._armed[key]
        with self._client.client() as client:
            while self._works and not self._closing:
                armed.wait()
                if self._is_there(client, key):
                    armed.clear()
                    self._ring()

    def _is_there(self, client: redis.Redis, key: str) -> bool:
        """Wait for a moment until the queue has something in it."""
        try:
            if key not in self._blocked:
                self._blocked[key] = client.client_id()
            return (
                not self._closing and client.blmove(key, key, BLOCK_S, "LEFT", "LEFT") is not None
            )
        except redis.exceptions.NoPermissionError as error:
            log.warning("Redis does not let us wait for jobs, so we look for them: %s", error)
            self._works = False
        except (redis.RedisError, OSError, ValueError):
            # The worker notices by itself what is wrong with Redis, and arms us afterwards.
            self._blocked.pop(key, None)
        return True

    def _ring(self) -> None:
        # Full: it rings already. Closed: nobody listens any more.
        with contextlib.suppress(OSError):
            os.write(self._write_fd, b".")
