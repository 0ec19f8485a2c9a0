"""A TCP proxy in front of Redis that fails as networks do.

Owns what happens to bytes and connections on the way; of Redis it knows only how a script's call
and its reply begin, so as to lose the one reply that a test wants lost.
"""

from __future__ import annotations

import contextlib
import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from types import TracebackType
from typing import Self

CHUNK_BYTES = 1 << 16
CONNECT_S = 5.0


class _Link:
    """One client's connection and ours to the server for it."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.client = client
        self.server = server
        self.awaits_reply = False  # of the script whose reply is to be lost
        self.has_hole = False  # Once data is missing nothing may follow, as with TCP.

    def close(self) -> None:
        for end in (self.client, self.server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


class Proxy:
    """Listens on a port of its own and passes everything on, until told otherwise.

    Attributes:
        num_connections: accepted so far.
        reply_lost: set when the reply that `lose_reply` waits for was lost.
    """

    def __init__(self, server_port: int) -> None:
        self._server_port = server_port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._links: set[_Link] = set()
        self._flows = threading.Event()
        self._flows.set()
        self._swallows = self._hangs_up = self._closed = False
        self._delay_s = 0.0
        self._lost_script: tuple[bytes, bytes] | None = None
        self.num_connections = 0
        self.reply_lost = threading.Event()

    @property
    def url(self) -> str:
        """Its address, with a time limit that does not keep a test waiting."""
        return f"redis://127.0.0.1:{self.port}/0?socket_timeout=0.5"

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closed = True
        self._flows.set()
        self._stop_listening()
        self.cut()

    def cut(self) -> None:
        """Close every connection there is."""
        for link in list(self._links):
            link.close()

    @contextmanager
    def cutting(self) -> Iterator[None]:
        """Accept connections and hang up at once."""
        self._hangs_up = True
        self.cut()
        try:
            yield
        finally:
            self._hangs_up = False

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Nobody listens."""
        self._stop_listening()
        self.cut()
        try:
            yield
        finally:
            self._listener = socket.create_server(("127.0.0.1", self.port))
            self._listen()

    @contextmanager
    def swallowing(self) -> Iterator[None]:
        """Accept everything, answer nothing; what is sent meanwhile never arrives."""
        self._swallows = True
        try:
            yield
        finally:
            self._swallows = False
            self.cut()  # Their streams have a hole.

    @contextmanager
    def stalling(self) -> Iterator[None]:
        """Accept everything, pass nothing on; what is sent meanwhile arrives late."""
        self._flows.clear()
        try:
            yield
        finally:
            self._flows.set()

    @contextmanager
    def slow(self, delay_s: float) -> Iterator[None]:
        """Each piece of data takes so long in each direction."""
        self._delay_s = delay_s
        try:
            yield
        finally:
            self._delay_s = 0.0

    def lose_reply(self, script: str, containing: bytes = b"") -> None:
        """Let the script's next call through, but hang up instead of passing on its reply.

        Args:
            containing: a call whose reply does not begin with these bytes in it, is not the one.
        """
        source = files("shoal_worker").joinpath("scripts", f"{script}.lua").read_bytes()
        self.reply_lost.clear()
        self._lost_script = (hashlib.sha1(source).hexdigest().encode(), containing)

    def _listen(self) -> None:
        threading.Thread(target=self._accept, args=[self._listener], daemon=True).start()

    def _stop_listening(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # Wakes the thread in `accept`.
        self._listener.close()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                self.num_connections += 1
                if self._hangs_up:
                    client.close()
                    continue
                self._connect(client)

    def _connect(self, client: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._server_port), CONNECT_S)
        except OSError:
            client.close()
            return
        server.settimeout(None)
        link = _Link(client, server)
        self._links.add(link)
        for pump in (self._pump_calls, self._pump_replies):
            threading.Thread(target=self._pumped, args=[pump, link], daemon=True).start()

    def _pumped(self, pump: object, link: _Link) -> None:
        assert callable(pump)
        with contextlib.suppress(OSError):
            pump(link)
        link.close()
        self._links.discard(link)

    def _pump_calls(self, link: _Link) -> None:
        while data := link.client.recv(CHUNK_BYTES):
            lost = self._lost_script
            # A call fits a chunk up to its hash, and a connection makes one call at a time.
            if lost is not None and b"EVALSHA" in data and lost[0] in data:
                link.awaits_reply = True
            if self._passes(link):
                link.server.sendall(data)

    def _pump_replies(self, link: _Link) -> None:
        while data := link.server.recv(CHUNK_BYTES):
            awaited, link.awaits_reply = link.awaits_reply, False
            lost = self._lost_script
            # An error is no reply: a server that does not know the script is sent its source.
            if awaited and lost is not None and not data.startswith(b"-") and lost[1] in data:
                self._lost_script = None
                self.reply_lost.set()
                return
            if self._passes(link):
                link.client.sendall(data)

    def _passes(self, link: _Link) -> bool:
        """Whether data goes on, after as long as it takes."""
        self._flows.wait()
        if self._delay_s:
            time.sleep(self._delay_s)  # The slowness itself, not a wait for anything.
        if self._swallows:
            link.has_hole = True
        return not link.has_hole
