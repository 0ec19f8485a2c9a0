"""The worker's end of its engine: started, listened to, and started again when it dies.

Owns the process and what it said of itself. It knows no jobs: who held some is told of a death.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress

from shoal_worker.engine_process import EngineProcess
from shoal_worker.messages import FromEngine, LoadFailed, Ready, ToEngine

MAX_RESTARTS = 3
SILENT_S = 30.0

log = logging.getLogger("shoal.worker")


class EngineFailedError(Exception):
    """The engine cannot be started, or died too often."""


class EngineLink:
    """One engine at a time.

    Args:
        start: starts an engine process.

    Attributes:
        ready: what the engine serves; None while it loads.
    """

    def __init__(self, start: Callable[[], EngineProcess]) -> None:
        self._start = start
        self._process: EngineProcess | None = None
        self._num_deaths = 0
        self._last_news_s = time.monotonic()
        self.ready: Ready | None = None

    def start(self) -> None:
        """Start the engine; `ready` is set by a later `receive`."""
        self._process = self._start()

    def stop(self) -> None:
        """End the engine, if there is one."""
        if self._process is not None:
            self._process.stop()

    def tell(self, message: ToEngine) -> None:
        """Send a message; a dead engine is dealt with where its silence is heard, in `receive`."""
        assert self._process is not None, "an engine is started before it is told anything"
        with suppress(OSError):
            self._process.send(message)

    def receive(self, timeout_s: float) -> list[FromEngine] | None:
        """Everything the engine has said, after up to `timeout_s`; None if it died instead.

        After a death another one has been started, and nothing that this one held is being made.

        Raises:
            EngineFailedError: it cannot load its model, or it dies again and again.
        """
        assert self._process is not None, "an engine is started before it is heard"
        try:
            messages = self._process.receive(timeout_s)
        except EOFError:
            self._restart(self._process)
            return None
        for message in messages:
            self._last_news_s = time.monotonic()
            if isinstance(message, LoadFailed):
                raise EngineFailedError(message.reason)
            if isinstance(message, Ready):
                self.ready = message
        return messages

    def trouble(self, *, has_work: bool) -> str | None:
        """What is wrong with the engine, in words, or None."""
        if self._process is None or not self._process.is_alive:
            return "the engine process is not running"
        silent_s = time.monotonic() - self._last_news_s
        if has_work and silent_s > SILENT_S:
            return f"the engine has been silent for {silent_s:.0f} s with work in hand"
        return None

    def _restart(self, dead: EngineProcess) -> None:
        text = dead.exit_text()
        self._num_deaths += 1
        if self.ready is None or self._num_deaths > MAX_RESTARTS:
            raise EngineFailedError(f"the engine process {text}")
        log.error("the engine process %s; starting another", text)
        self.ready = None
        dead.stop()
        self.start()
