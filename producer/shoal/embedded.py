"""The embedded Redis: one real server for all `shoal` commands of a user, on a private socket.

Owns who uses the server, hence when it starts and stops; `embedded_server` is how. Doesn't know
what is kept in the server, nor how clients connect to it.

Three locks in the folder, by flock, so that the kernel drops them when their holder dies:

    use.lock      shared; held by every command as long as it uses the server
    start.lock    exclusive; held by the one command that is starting or stopping the server
    server.lock   exclusive; inherited by the server, so held exactly as long as it lives
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import logging
import os
import socket
import sys
import time
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Self

from shoal import embedded_server
from shoal.errors import RedisUnavailable

POLL_S = 0.01
START_LOCK_TIMEOUT_S = 60.0
LOADING_TIMEOUT_S = 600.0
STOP_TIMEOUT_S = 30.0
GIVE_UP_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)


def default_home(environ: Mapping[str, str] = os.environ) -> Path:
    """Where Shoal keeps a user's data: SHOAL_HOME, or `shoal` in the user's data folder."""
    if home := environ.get("SHOAL_HOME"):
        return Path(home).expanduser()
    # A relative path there is invalid and to be ignored, says the XDG specification.
    if sys.platform != "darwin" and os.path.isabs(data := environ.get("XDG_DATA_HOME", "")):
        return Path(data) / "shoal"
    try:
        user_home = Path.home()
    except RuntimeError as error:
        raise RedisUnavailable("this user has no home folder: set SHOAL_HOME") from error
    if sys.platform == "darwin":
        return user_home / "Library" / "Application Support" / "shoal"
    return user_home / ".local" / "share" / "shoal"


def running_url(home: Path | None = None) -> str | None:
    """The URL of the embedded Redis of `home` if it answers now. Starts, creates, locks nothing."""
    found = embedded_server.socket_of(
        (default_home() if home is None else home) / "redis" / "server.lock"
    )
    if found is None or embedded_server.ask(found[1], b"PING") != b"+PONG":
        return None
    return embedded_server.url_of(found[1])


class EmbeddedRedis:
    """A share in the embedded Redis of `home`: the first takes it up, the last shuts it down.

    A context manager, or `start` and `close`. `start` may be called again at any time: it brings
    back a server that died. A command that ends without `close` closes at exit; one that is killed
    leaves the server to the next command. A forked child has no share: its parent's counts.

    Args:
        home: Shoal's data folder; `default_home()` when None. The server's files are in `redis/`.
        start_timeout_s: how long a server that doesn't answer is waited for; one that answers that
            it is loading its data gets up to `LOADING_TIMEOUT_S`.
    """

    def __init__(self, home: Path | None = None, *, start_timeout_s: float = 10.0) -> None:
        self.home = default_home() if home is None else home
        self.folder = (self.home / "redis").resolve()
        self.log_file = self.folder / "redis.log"
        self._start_timeout_s = start_timeout_s
        self._server_lock = self.folder / "server.lock"
        self._use = _FileLock(self.folder / "use.lock")
        self._socket: Path | None = None

    @property
    def url(self) -> str:
        """The `unix://` URL of the started server."""
        if self._socket is None:
            raise RuntimeError("the embedded Redis is not started: call start() first")
        return embedded_server.url_of(self._socket)

    def start(self) -> Self:
        """Takes a share in the server, which answers when this returns.

        Raises:
            RedisUnavailable: it cannot be started, its folder cannot be used, or its data were
                written by a newer server; the message says which and what to do.
        """
        try:
            embedded_server.make_private(self.folder)
            with self._start_lock():
                try:
                    self._use.try_acquire(fcntl.LOCK_SH)
                    self._ensure_running()
                except BaseException:
                    self._leave(stop_timeout_s=GIVE_UP_TIMEOUT_S)
                    raise
        except OSError as error:
            raise RedisUnavailable(
                f"the embedded Redis cannot use {self.folder}: {error.strerror or error}; "
                "set SHOAL_HOME to a folder of yours on a local disk"
            ) from error
        atexit.unregister(self.close)
        atexit.register(self.close)
        return self

    def close(self) -> None:
        """Gives the share back; the last one saves the data and stops the server.

        Never raises for a server that doesn't stop: it goes on, and the next command finds it.
        """
        atexit.unregister(self.close)
        if not self._use.is_open:
            return
        try:
            with self._start_lock():
                self._leave(stop_timeout_s=STOP_TIMEOUT_S)
        except (RedisUnavailable, OSError) as error:
            _log.warning("the embedded Redis is left running: %s", error)
        finally:
            self._use.release()
            self._socket = None

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextlib.contextmanager
    def _start_lock(self) -> Iterator[None]:
        lock = _FileLock(self.folder / "start.lock")
        deadline_s = time.monotonic() + START_LOCK_TIMEOUT_S
        try:
            while not lock.try_acquire(fcntl.LOCK_EX):
                if time.monotonic() > deadline_s:
                    raise RedisUnavailable(
                        "another shoal command has been starting or stopping the embedded Redis in "
                        f"{self.folder} for {START_LOCK_TIMEOUT_S:g} s; see {self.log_file}"
                    )
                time.sleep(POLL_S)
            yield
        finally:
            lock.release()

    def _ensure_running(self) -> None:
        server = _FileLock(self._server_lock)
        deadline_s = time.monotonic() + self._start_timeout_s
        loading_deadline_s = time.monotonic() + LOADING_TIMEOUT_S
        log_start_bytes: int | None = None
        drops_torn_end = False
        try:
            while time.monotonic() < deadline_s:
                if server.try_acquire(fcntl.LOCK_EX):  # No server lives, whatever is left of one.
                    if log_start_bytes is not None:
                        self._keep_torn_data(log_start_bytes, is_first=not drops_torn_end)
                        drops_torn_end = True
                    log_start_bytes = self.log_file.stat().st_size if self.log_file.exists() else 0
                    embedded_server.launch(
                        self.folder, server.fileno(), drops_torn_end=drops_torn_end
                    )
                    server.release()  # The server has it now.
                reply = self._ask(b"PING")
                if reply == b"+PONG":
                    return
                if reply is not None and reply.startswith(b"-LOADING"):
                    deadline_s = min(time.monotonic() + self._start_timeout_s, loading_deadline_s)
                time.sleep(POLL_S)
        finally:
            server.release()
        raise self._no_answer()

    def _keep_torn_data(self, log_start_bytes: int, *, is_first: bool) -> None:
        """Raises for a server that ended, unless it can start on data without their torn end."""
        reason = embedded_server.logged_reason(self.log_file, log_start_bytes)
        if not (is_first and reason.startswith(embedded_server.TORN_END)):
            raise embedded_server.start_failure(reason, self.log_file)
        _log.warning(
            "the embedded Redis was stopped in the middle of a write; it starts without that torn "
            "end, and the data as they were are kept in %s",
            embedded_server.keep_copy(self.folder),
        )

    def _ask(self, command: bytes) -> bytes | None:
        found = embedded_server.socket_of(self._server_lock)
        if found is None:
            return None
        self._socket = found[1]
        return embedded_server.ask(self._socket, command)

    def _leave(self, *, stop_timeout_s: float) -> None:
        """Drops the share; stops the server if it was the last. The start lock is held."""
        try:
            # Nobody can come now, for that takes the start lock: who gets this is the last.
            if self._use.try_acquire(fcntl.LOCK_EX):
                self._stop(stop_timeout_s)
        finally:
            self._use.release()

    def _stop(self, timeout_s: float) -> None:
        server = _FileLock(self._server_lock)
        deadline_s = time.monotonic() + timeout_s
        is_stopping = False
        try:
            while not server.try_acquire(fcntl.LOCK_EX):
                if time.monotonic() > deadline_s:
                    _log.warning("the embedded Redis did not stop within %g s", timeout_s)
                    return
                if not is_stopping:
                    # SHUTDOWN flushes the append-only file to the disk before the server exits.
                    reply = self._ask(b"SHUTDOWN")
                    is_stopping = reply == b""
                    if reply:
                        _log.warning("the embedded Redis refused to stop: %s", reply.decode())
                        return
                time.sleep(POLL_S)
        finally:
            server.release()

    def _no_answer(self) -> RedisUnavailable:
        found = embedded_server.socket_of(self._server_lock)
        if found is not None and (host := found[0]) != socket.gethostname():
            return RedisUnavailable(
                f"the embedded Redis in {self.folder} runs on another machine, {host}: "
                "give --redis, or set SHOAL_HOME to a folder of this machine's own"
            )
        try:
            pid = (self.folder / "server.pid").read_text().strip()
        except OSError:
            pid = "unknown"
        return RedisUnavailable(
            f"the embedded Redis in {self.folder} (process {pid}) gave no answer within "
            f"{self._start_timeout_s:g} s; stop that process and try again, or see {self.log_file}"
        )


class _FileLock:
    """An flock on a file. A forked child drops its copy, or it would hold its parent's lock on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def is_open(self) -> bool:
        return self._fd is not None

    def fileno(self) -> int:
        if self._fd is None:
            raise ValueError(f"{self.path} is not open")
        return self._fd

    def try_acquire(self, kind: int) -> bool:
        if self._fd is None:
            # Python opens files close-on-exec: programs that we start hold no lock of ours.
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
            _open_locks.add(self)
            _guard_against_forks()
        try:
            fcntl.flock(self._fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        # Never LOCK_UN: that would unlock for the other processes which inherited the file, too.
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        _open_locks.discard(self)


_open_locks: weakref.WeakSet[_FileLock] = weakref.WeakSet()


@functools.cache
def _guard_against_forks() -> None:
    os.register_at_fork(after_in_child=_drop_locks)


def _drop_locks() -> None:
    for lock in list(_open_locks):
        lock.release()
