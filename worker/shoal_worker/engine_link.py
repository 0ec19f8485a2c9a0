"""The worker's end of its engine: started, listened to, and started again when it dies or hangs.

Owns the process and what it said of itself. It knows no jobs: who held some is told of a death.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from shoal_worker.engine_process import EngineProcess
from shoal_worker.messages import Dying, FromEngine, LoadFailed, Ready, ToEngine

MAX_FAILED_LOADS = 3  # One after the other, of a model that was loaded before.

log = logging.getLogger("shoal.worker")


class EngineFailedError(Exception):
    """The engine cannot be started, or died too often."""


class EngineLink:
    """One engine at a time.

    Args:
        start: starts an engine process.
        hang_s: an engine that is silent for so long with work in hand is killed.

    Attributes:
        ready: what the engine serves; None while it loads.
        served: what the last one that was ready served.
        last_death: how the last one ended, in words.
        died_of_memory: whether the last one said that it was out of memory before it ended.
    """

    def __init__(
        self,
        start: Callable[[], EngineProcess],
        *,
        hang_s: float = 300.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._start = start
        self._hang_s = hang_s
        self._clock = clock
        self._process: EngineProcess | None = None
        self._last_news_s = clock()
        self._dying: Dying | None = None
        self._failed_loads = 0
        self.ready: Ready | None = None
        self.served: Ready | None = None
        self.last_death = ""
        self.died_of_memory = False

    def start(self) -> None:
        """Start the engine; `ready` is set by a later `receive`."""
        self._process = self._start()

    @property
    def pid(self) -> int | None:
        """The process's id, if there is one."""
        return None if self._process is None else self._process.pid

    def stop(self) -> None:
        """End the engine, if there is one."""
        if self._process is not None:
            self._process.stop()

    def tell(self, message: ToEngine) -> None:
        """Send a message; a dead engine is dealt with where its silence is heard, in `receive`.

        Raises:
            RecursionError: the message is nested too deeply.
        """
        assert self._process is not None, "an engine is started before it is told anything"
        self._process.send(message)

    def work_begins(self) -> None:
        """The idle engine is about to be told something: from now on it may not be silent."""
        self._last_news_s = self._clock()

    def receive(
        self, timeout_s: float, *, wake: int | None = None, has_work: bool = False
    ) -> list[FromEngine] | None:
        """Everything the engine has said, after up to `timeout_s`; None if it died instead.

        After a death another one has been started, and nothing that this one held is being made.

        Args:
            wake: a file descriptor that ends the wait when it becomes readable.
            has_work: whether it should be saying something; if it does not, it is killed.

        Raises:
            EngineFailedError: it cannot load its model, or dies while it does.
        """
        assert self._process is not None, "an engine is started before it is heard"
        try:
            messages = self._process.receive(timeout_s, wake)
        except EOFError:
            self._restart(self._process, self._process.exit_text())
            return None
        for message in messages:
            self._last_news_s = self._clock()
            match message:
                case LoadFailed(reason):
                    raise EngineFailedError(reason)
                case Dying():
                    self._dying = message
                case Ready():
                    self.ready = self.served = message
                    self._failed_loads = 0
        silent_s = self._clock() - self._last_news_s
        if has_work and self.ready is not None and silent_s > self._hang_s:
            self._process.kill()
            self._restart(self._process, f"was silent for {silent_s:.0f} s and was killed")
            return None
        return messages

    def trouble(self, *, has_work: bool) -> str | None:
        """What is wrong with the engine, in words, or None."""
        if self._process is None or not self._process.is_alive:
            return "the engine process is not running"
        silent_s = self._clock() - self._last_news_s
        if has_work and silent_s > self._hang_s / 2:
            return f"the engine has been silent for {silent_s:.0f} s with work in hand"
        return None

    def _restart(self, dead: EngineProcess, text: str) -> None:
        self.last_death = f"{text} ({self._dying.reason})" if self._dying else text
        self.died_of_memory = self._dying is not None and self._dying.out_of_memory
        self._dying = None
        if self.ready is None:
            self._failed_loads += 1
        # One that never served will not; one that did may have been killed by somebody.
        if self.ready is None and (self.served is None or self._failed_loads >= MAX_FAILED_LOADS):
            raise EngineFailedError(f"the engine process {self.last_death} before it was ready")
        log.error("the engine process %s; starting another", self.last_death)
        self.ready = None
        self._last_news_s = self._clock()
        dead.stop()
        self.start()
