"""The two directions of the pipe between worker and engine process, each with a thread.

Were messages sent and read in the main threads, both ends could block on a full pipe, each in its
`send`, for ever; and a hung engine would hang the worker that is to notice it.
"""

from __future__ import annotations

import contextlib
import logging
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, Generic, TypeVar

Message = TypeVar("Message")

log = logging.getLogger("shoal.engine")


class Outbox(Generic[Message]):
    """Sends messages in the order they were put, without ever blocking who puts them."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._pickled: SimpleQueue[bytes | None] = SimpleQueue()
        self._thread = Thread(target=self._send, name="outbox", daemon=True)
        self._thread.start()

    def put(self, message: Message) -> None:
        """Send a message soon; to a peer that is gone, never.

        Raises:
            RecursionError: it is nested too deeply to be sent.
        """
        # Pickled here, so that what cannot be sent fails where it comes from.
        self._pickled.put(bytes(ForkingPickler.dumps(message)))

    def close(self, timeout_s: float) -> None:
        """Send what is left, for so long at most."""
        self._pickled.put(None)
        self._thread.join(timeout_s)

    def _send(self) -> None:
        with contextlib.suppress(OSError):
            while (pickled := self._pickled.get()) is not None:
                self._connection.send_bytes(pickled)


class Inbox(Generic[Message]):
    """Reads messages as they come.

    Args:
        at_end: taken as the last message when the peer is gone.
    """

    def __init__(self, connection: Connection[Any, Any], at_end: Message) -> None:
        self._connection = connection
        self._at_end = at_end
        self._messages: SimpleQueue[Message] = SimpleQueue()
        Thread(target=self._read, name="inbox", daemon=True).start()

    def take(self, *, block: bool) -> list[Message]:
        """All messages so far; with `block`, after waiting for the first."""
        messages = [self._messages.get()] if block else []
        with contextlib.suppress(Empty):
            while True:
                messages.append(self._messages.get_nowait())
        return messages

    def _read(self) -> None:
        try:
            while True:
                self._messages.put(self._connection.recv())
        except (EOFError, OSError):
            pass  # The peer is gone.
        except Exception:
            # The edge of a thread: who waits for a message must not wait for ever.
            log.exception("a message cannot be read")
        self._messages.put(self._at_end)
