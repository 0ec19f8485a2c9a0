"""Redis behind sentinels: what an address says, and a worker that lives through a failover."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path

import pytest
import redis
from tests.conftest import wait_until
from tests.faults.server import RedisServer, free_port, require_server, server_binary

from shoal import Client
from shoal.errors import RedisUnavailable
from shoal.redis_url import connect, connect_async
from shoal.sentinel import parse_sentinel_url

CONFIG = """
port {port}
bind 127.0.0.1
dir {folder}
logfile {folder}/sentinel.log
sentinel monitor main 127.0.0.1 {master} 1
sentinel down-after-milliseconds main 500
sentinel failover-timeout main 2000
"""


def test_address_names_sentinels_service_and_both_users() -> None:
    address = parse_sentinel_url(
        "redis+sentinel://me:a%2Fb@s1:1,s2,[::1]:3/main/2?sentinel_password=p&socket_timeout=7"
    )

    assert address.hosts == (("s1", 1), ("s2", 26379), ("::1", 3))
    assert address.service == "main"
    assert address.options == {"username": "me", "password": "a/b", "db": 2, "socket_timeout": 7.0}
    assert address.own_options == {"password": "p"}


def test_tls_is_for_the_sentinels_too() -> None:
    address = parse_sentinel_url("rediss+sentinel://s/main?ssl_ca_certs=/ca.pem")

    assert address.options["ssl"] is address.own_options["ssl"] is True
    assert address.own_options["ssl_ca_certs"] == address.options["ssl_ca_certs"] == "/ca.pem"


def test_limits_of_the_client_hold_for_the_sentinels_and_options_of_the_url_win() -> None:
    address = parse_sentinel_url("redis+sentinel://s/main?socket_timeout=7")

    with closing(address.client(socket_timeout=5.0, socket_connect_timeout=5.0)) as client:
        pool = client.connection_pool
        own = pool.sentinel_manager.sentinels[0].get_connection_kwargs()  # type: ignore[attr-defined]
        limits = pool.connection_kwargs
    assert (limits["socket_timeout"], limits["socket_connect_timeout"]) == (7.0, 5.0)
    assert (own["socket_timeout"], own["socket_connect_timeout"]) == (7.0, 5.0)


@contextmanager
def sentinel_of(master: RedisServer, folder: Path) -> Iterator[str]:
    """A sentinel that watches one server as `main`; the address for clients."""
    port = free_port()
    config = folder / "sentinel.conf"
    config.write_text(CONFIG.format(port=port, folder=folder, master=master.port))
    with subprocess.Popen(
        [server_binary(), str(config), "--sentinel"],
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield f"redis+sentinel://127.0.0.1:{port}/main/0"
        finally:
            process.kill()


@contextmanager
def served(url: str) -> Iterator[None]:
    command = [sys.executable, "-m", "tests.scripted_engine", url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        try:
            yield
        finally:
            process.kill()


def answers(url: str) -> bool:
    with suppress(RedisUnavailable), closing(connect(url, retries=0)) as client:
        return bool(client.ping())
    return False


@pytest.mark.server
def test_worker_and_client_go_on_with_the_new_master_after_a_failover(tmp_path: Path) -> None:
    require_server()
    with ExitStack() as stack:
        master = stack.enter_context(RedisServer())
        replica = stack.enter_context(
            RedisServer(
                "--replicaof", "127.0.0.1", str(master.port), "--repl-ping-replica-period 1"
            )
        )
        url = stack.enter_context(sentinel_of(master, tmp_path))
        wait_until(lambda: answers(url), "the sentinel knows the master")
        sentinel = stack.enter_context(redis.Redis(port=int(url.split(":")[2].split("/")[0])))
        wait_until(lambda: sentinel.sentinel_slaves("main"), "the sentinel knows the replica")
        stack.enter_context(served(url))
        client = stack.enter_context(Client(url))
        before = client.submit("before").result(timeout=20).text
        with replica.client() as of_replica:
            wait_until(
                lambda: of_replica.info("replication")["master_link_status"] == "up", "in step"
            )
            master.kill()
            wait_until(lambda: of_replica.info("replication")["role"] == "master", "it took over")

        def submitted() -> bool:
            with suppress(RedisUnavailable):
                after.append(client.submit("after").result(timeout=20).text)
            return bool(after)

        after: list[str] = []
        wait_until(submitted, "the new master takes jobs")

    assert (before, after) == ("BEFORE", ["AFTER"])


@pytest.mark.server
def test_async_client_finds_the_master_and_an_unknown_service_is_told(tmp_path: Path) -> None:
    require_server()

    async def count(url: str) -> int:
        client = await connect_async(url)
        try:
            return int(await client.incr("async"))
        finally:
            await client.aclose()

    with RedisServer() as master, sentinel_of(master, tmp_path) as url:
        wait_until(lambda: answers(url), "the sentinel knows the master")
        assert asyncio.run(count(url)) == 1
        with pytest.raises(
            RedisUnavailable, match="no sentinel answers that knows a living master"
        ):
            connect(url.replace("main", "other"), retries=0)
