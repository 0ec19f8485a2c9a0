"""The embedded Redis, for real: commands that share a server, are killed, or come all at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import redis

from shoal import embedded_server
from shoal.embedded import EmbeddedRedis, running_url

DEADLINE_S = 20.0

USE = """
import sys
from pathlib import Path
from shoal.embedded import EmbeddedRedis
with EmbeddedRedis(Path(sys.argv[1])) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition never came true"
        time.sleep(0.01)


class Command:
    """A `shoal` command in a process of its own: uses the server until it is told to end."""

    def __init__(self, home: Path, script: str = USE, **environ: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-c", script, str(home)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, **environ},
            process_group=0,
        )

    def url(self) -> str:
        """The URL it prints once it has the server."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], DEADLINE_S)
        assert ready, "the command said nothing"
        return self.process.stdout.readline().decode().strip()

    def end(self) -> int:
        self.process.communicate(timeout=DEADLINE_S)
        return self.process.returncode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.end()


Start = Callable[..., Command]


@pytest.fixture
def home() -> Iterator[Path]:
    """A short path, as a user's is; the server in it is killed if a test left it."""
    with tempfile.TemporaryDirectory(prefix="shoal") as folder:
        yield Path(folder)
        with contextlib.suppress(FileNotFoundError):
            os.kill(server_pid(Path(folder)), signal.SIGKILL)
        wait_until(lambda: not server_lives(Path(folder)))


@pytest.fixture
def start(home: Path) -> Iterator[Start]:
    commands: list[Command] = []

    def start_command(script: str = USE, **environ: str) -> Command:
        commands.append(Command(home, script, **environ))
        return commands[-1]

    yield start_command
    for command in commands:
        command.kill()


def server_pid(home: Path) -> int:
    return int((home / "redis" / "server.pid").read_text())


def server_lives(home: Path) -> bool:
    try:
        lock_fd = os.open(home / "redis" / "server.lock", os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock_fd)
    return False


def kill_server(home: Path) -> None:
    os.kill(server_pid(home), signal.SIGKILL)
    wait_until(lambda: not server_lives(home))


@contextlib.contextmanager
def client_of(url: str) -> Iterator[redis.Redis]:
    with contextlib.closing(redis.Redis.from_url(url, decode_responses=True)) as client:
        yield client


def put(url: str, key: str, value: str) -> None:
    with client_of(url) as client:
        client.set(key, value)


def get(url: str, key: str) -> object:
    with client_of(url) as client:
        return client.get(key)


def test_data_survive_a_stop_and_a_new_start(home: Path) -> None:
    with EmbeddedRedis(home) as server:
        put(server.url, "prompt", "once")

    assert not server_lives(home)
    assert running_url(home) is None
    with EmbeddedRedis(home) as server:
        assert get(server.url, "prompt") == "once"


def test_data_survive_the_killed_server_and_start_brings_it_back(home: Path) -> None:
    with EmbeddedRedis(home) as server:
        put(server.url, "prompt", "once")
        kill_server(home)
        assert (home / "redis" / "redis.sock").exists()

        server.start()

        assert get(server.url, "prompt") == "once"
    assert not server_lives(home)


def test_server_persists_evicts_nothing_and_has_no_port(home: Path) -> None:
    with EmbeddedRedis(home) as server, client_of(server.url) as client:
        settings = client.config_get("*")

    assert settings["appendonly"] == "yes"
    assert settings["appendfsync"] == "always"
    assert settings["maxmemory-policy"] == "noeviction"
    assert settings["save"] == ""
    assert settings["port"] == "0"


def test_only_the_user_can_enter_the_folder_and_the_socket(home: Path) -> None:
    (home / "redis").mkdir(mode=0o755)

    with EmbeddedRedis(home):
        modes = {
            path.name: stat.S_IMODE(path.stat().st_mode)
            for path in ((home / "redis"), *(home / "redis").iterdir())
        }

    assert modes["redis"] == modes["redis.sock"] == modes["appendonlydir"] == 0o700
    assert modes["redis.log"] == modes["server.lock"] == 0o600


def test_two_commands_share_a_server_and_the_last_one_stops_it(home: Path, start: Start) -> None:
    first, second = start(), start()
    assert first.url() == second.url() == running_url(home)
    pid = server_pid(home)

    assert first.end() == 0
    assert server_lives(home)
    assert server_pid(home) == pid

    assert second.end() == 0
    assert not server_lives(home)
    assert not (home / "redis" / "redis.sock").exists()


def test_server_outlives_the_killed_command_that_started_it(home: Path, start: Start) -> None:
    command = start()
    put(command.url(), "prompt", "once")
    pid = server_pid(home)

    command.kill()
    assert server_lives(home)

    with EmbeddedRedis(home) as server:
        assert server_pid(home) == pid
        assert get(server.url, "prompt") == "once"
    assert not server_lives(home)


def test_server_of_a_command_killed_while_starting_it_is_taken_up(home: Path, start: Start) -> None:
    dies = "import os; from shoal import embedded_server as e; e.ask = lambda *_: os._exit(9)"
    assert start(dies + USE).end() == 9
    assert server_lives(home)

    with EmbeddedRedis(home) as server:
        put(server.url, "prompt", "once")
    assert not server_lives(home)


def test_commands_that_start_at_once_get_one_server(home: Path, start: Start) -> None:
    commands = [start() for _ in range(4)]

    assert len({command.url() for command in commands}) == 1
    log = (home / "redis" / "redis.log").read_text()
    assert log.count("Ready to accept connections") == 1

    assert [command.end() for command in commands] == [0, 0, 0, 0]
    assert not server_lives(home)


def test_ctrl_c_in_the_terminal_of_the_starter_spares_the_server(home: Path, start: Start) -> None:
    command = start()
    command.url()

    with EmbeddedRedis(home) as server:
        os.killpg(command.process.pid, signal.SIGINT)
        assert command.process.wait(DEADLINE_S) == -signal.SIGINT

        put(server.url, "prompt", "once")
    assert not server_lives(home)


def test_command_that_never_closes_stops_the_server_at_exit(home: Path, start: Start) -> None:
    forgets = USE.replace("with EmbeddedRedis(Path(sys.argv[1])) as server:", "if True:").replace(
        "    print", "    server = EmbeddedRedis(Path(sys.argv[1])).start()\n    print"
    )
    command = start(forgets)
    command.url()

    assert command.end() == 0
    assert not server_lives(home)


def test_server_holds_no_pipe_of_the_command_that_started_it(home: Path, start: Start) -> None:
    command = start(USE.replace("    sys.stdin.read()", "    import os; os._exit(0)"))

    command.process.communicate(timeout=DEADLINE_S)  # Ends with the last holder of stdout.

    assert server_lives(home)


def test_forked_child_holds_no_share(home: Path, start: Start) -> None:
    forks = """
    import os, signal
    if os.fork() == 0:
        os.closerange(0, 3)
        server.close()
        signal.pause()
    print"""
    command = start(USE.replace("    print", forks))
    url = command.url()
    assert running_url(home) == url

    assert command.end() == 0

    assert not server_lives(home)


def test_long_home_gets_a_private_socket_that_all_its_commands_find(
    home: Path, start: Start, tmp_path: Path
) -> None:
    long_home = home / ("x" * 100)

    with EmbeddedRedis(long_home) as server:
        socket_file = Path(server.url.removeprefix("unix://").removesuffix("?db=0"))
        command = Command(long_home, TMPDIR=str(tmp_path))
        assert command.url() == server.url

    assert socket_file.parent.parent == Path(tempfile.gettempdir())
    assert stat.S_IMODE(socket_file.parent.stat().st_mode) == 0o700
    assert len(os.fsencode(socket_file)) <= embedded_server.MAX_SOCKET_PATH_BYTES
    assert command.end() == 0
    assert not server_lives(long_home)
    socket_file.parent.rmdir()
