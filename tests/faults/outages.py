"""The ways in which Redis itself fails, each for as long as a block lasts."""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import redis
from tests.conftest import wait_until
from tests.faults.proxy import Proxy
from tests.faults.server import RedisServer, free_port

Outage = Callable[[RedisServer, Proxy], AbstractContextManager[None]]


@contextmanager
def killed_and_restarted(server: RedisServer, _proxy: Proxy) -> Iterator[None]:
    """SIGKILL, and a new process with what the old one had written."""
    server.kill()
    try:
        yield
    finally:
        server.start()


@contextmanager
def full(server: RedisServer, _proxy: Proxy) -> Iterator[None]:
    """All its memory is in use, and nothing may be evicted."""
    with server.client() as client:
        client.config_set("maxmemory", "1mb")
        memory = client.info("memory")
        assert memory["used_memory"] > memory["maxmemory"], "the server fits into a megabyte"
        try:
            yield
        finally:
            client.config_set("maxmemory", 0)


@contextmanager
def unable_to_save(server: RedisServer, _proxy: Proxy) -> Iterator[None]:
    """Its snapshots fail, so it takes no writes (MISCONF)."""
    gone = server.folder / "gone"
    gone.mkdir(exist_ok=True)
    with server.client() as client:
        client.config_set("dir", str(gone))
        shutil.rmtree(gone)
        client.config_set("save", "3600 1")
        with contextlib.suppress(redis.ResponseError):
            client.bgsave()
        wait_until(lambda: _last_save(client) == "err", "a snapshot has failed")
        try:
            yield
        finally:
            client.config_set("dir", str(server.folder))
            client.bgsave()
            wait_until(lambda: _last_save(client) == "ok", "a snapshot is saved")


@contextmanager
def a_replica(server: RedisServer, _proxy: Proxy) -> Iterator[None]:
    """It follows a master that is not there, as in the middle of a failover: no writes."""
    with server.client() as client:
        client.replicaof("127.0.0.1", free_port())
        try:
            yield
        finally:
            client.replicaof("NO", "ONE")


@contextmanager
def busy(server: RedisServer, _proxy: Proxy) -> Iterator[None]:
    """Somebody's script does not end."""
    with server.client() as client, server.client() as culprit:
        client.config_set("lua-time-limit", 50)
        culprit.connection_pool.connection_kwargs["socket_timeout"] = None
        thread = threading.Thread(target=_run_for_ever, args=[culprit], daemon=True)
        thread.start()
        wait_until(lambda: _is_busy(client), "it is busy")
        try:
            yield
        finally:
            client.script_kill()
            thread.join(10)


def cut(_server: RedisServer, proxy: Proxy) -> AbstractContextManager[None]:
    """Connections are accepted and closed."""
    return proxy.cutting()


def refused(_server: RedisServer, proxy: Proxy) -> AbstractContextManager[None]:
    """Nobody listens."""
    return proxy.refusing()


def swallowed(_server: RedisServer, proxy: Proxy) -> AbstractContextManager[None]:
    """Nothing arrives, and nobody says so."""
    return proxy.swallowing()


def stalled(_server: RedisServer, proxy: Proxy) -> AbstractContextManager[None]:
    """Everything arrives, once it is over."""
    return proxy.stalling()


def _last_save(client: redis.Redis) -> str:
    return str(client.info("persistence")["rdb_last_bgsave_status"])


def _run_for_ever(client: redis.Redis) -> None:
    with contextlib.suppress(redis.RedisError):
        client.eval("while true do end", 0)


def _is_busy(client: redis.Redis) -> bool:
    try:
        client.ping()
    except redis.ResponseError as error:
        return str(error).startswith("BUSY")
    return False
