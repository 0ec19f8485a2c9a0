"""The small HTTP server of a worker or exporter: /metrics, /healthz and /readyz.

Owns the port and the answers' form. What is healthy or ready, and what is counted, it asks.
"""

from __future__ import annotations

import errno
import gzip
import logging
import socket
import socketserver
import sys
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Self
from urllib.parse import urlsplit

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import choose_encoder

from shoal.errors import ShoalError

STOP_POLL_S = 0.05
CLIENT_TIMEOUT_S = 10.0
PLAIN = "text/plain; charset=utf-8"

log = logging.getLogger("shoal.http")

Check = Callable[[], str | None]


class HttpServer:
    """Serves from construction until `close`, in a daemon thread.

    Args:
        port: 0 picks a free one; `port` and `url` say which.
        is_healthy: None while the engine makes progress, else what is wrong.
        is_ready: None when work can be done, else what is missing.

    Raises:
        ShoalError: the address cannot be listened on.
    """

    def __init__(
        self,
        host: str,
        port: int,
        registry: CollectorRegistry,
        *,
        is_healthy: Check,
        is_ready: Check,
    ) -> None:
        self._server = _listen(host, port, _Pages(registry, is_healthy, is_ready))
        self.port = self._server.server_port
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{self.port}"
        self._thread = Thread(
            target=self._server.serve_forever, args=(STOP_POLL_S,), name="shoal-http", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening; answers under way are not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    body: bytes
    content_type: str = PLAIN
    encoding: str | None = None


@dataclass(frozen=True, slots=True)
class _Pages:
    """What there is to see."""

    registry: CollectorRegistry
    is_healthy: Check
    is_ready: Check

    def answer(self, path: str, accept: str, accept_encoding: str) -> _Answer:
        match path:
            case "/metrics":
                return self._metrics(accept, accept_encoding)
            case "/healthz":
                return _checked(self.is_healthy())
            case "/readyz":
                return _checked(self.is_ready())
            case _:
                return _Answer(404, b"there are /metrics, /healthz and /readyz\n")

    def _metrics(self, accept: str, accept_encoding: str) -> _Answer:
        encode, content_type = choose_encoder(accept)
        body = encode(self.registry)
        if "gzip" not in accept_encoding.lower():
            return _Answer(200, body, content_type)
        # Level 1: a scrape comes from near, and its cost is the engine's loss.
        return _Answer(200, gzip.compress(body, compresslevel=1), content_type, "gzip")


def _checked(reason: str | None) -> _Answer:
    return _Answer(200, b"ok\n") if reason is None else _Answer(503, f"{reason}\n".encode())


class _Server(ThreadingHTTPServer):
    """Threads that nobody waits for, an address of either family, no talk."""

    daemon_threads = True
    # Some Python versions turn it on, and a second worker would then share the port in silence.
    allow_reuse_port = False

    def __init__(self, family: socket.AddressFamily, address: tuple[str, int], pages: _Pages):
        self.address_family = family
        self.pages = pages
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        # Not HTTPServer's own, which looks the host's full name up: seconds where DNS is broken.
        socketserver.TCPServer.server_bind(self)
        self.server_port = int(self.server_address[1])

    def handle_error(self, _request: object, client_address: object) -> None:
        log.debug("the connection from %s broke: %s", client_address, sys.exc_info()[1])


class _Connection(BaseHTTPRequestHandler):
    """One connection: reads the request line, writes the answer."""

    server: _Server
    timeout = CLIENT_TIMEOUT_S
    server_version = "shoal"
    sys_version = ""

    def do_GET(self) -> None:
        """The page, or 404."""
        self._send(self._answer(), with_body=True)

    def do_HEAD(self) -> None:
        """The page's headers."""
        self._send(self._answer(), with_body=False)

    def log_message(self, _format: str, *_: object) -> None:
        """Nothing: a probe every few seconds is no news."""

    def _answer(self) -> _Answer:
        path = urlsplit(self.path).path
        accept, encoding = self.headers.get("Accept", ""), self.headers.get("Accept-Encoding", "")
        try:
            return self.server.pages.answer(path, accept, encoding)
        except Exception:
            # The edge of a request: a check that fails must not pass for a worker that is gone.
            log.exception("no answer could be made for %s", path)
            return _Answer(500, b"internal error; the log says more\n")

    def _send(self, answer: _Answer, *, with_body: bool) -> None:
        self.send_response(answer.status)
        self.send_header("Content-Type", answer.content_type)
        self.send_header("Content-Length", str(len(answer.body)))
        if answer.encoding:
            self.send_header("Content-Encoding", answer.encoding)
        self.end_headers()
        if with_body:
            self.wfile.write(answer.body)


def _listen(host: str, port: int, pages: _Pages) -> _Server:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        return _Server(family, (str(address[0]), port), pages)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ShoalError(
                f"port {port} on {host} is taken; choose another with --metrics-port, or 0 for a "
                "free one"
            ) from None
        raise ShoalError(
            f"cannot serve metrics on port {port} of {host}: {error.strerror}; choose another "
            "with --metrics-host and --metrics-port"
        ) from None
