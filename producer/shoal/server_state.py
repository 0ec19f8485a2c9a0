"""How the Redis server itself is: its memory, and whether what it is told reaches the disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from redis import Redis


@dataclass(frozen=True, slots=True)
class ServerState:
    """What INFO says that bears on losing jobs. True where something is not in use at all.

    Attributes:
        max_memory_bytes: 0 where there is no limit.
        aof_enabled: whether commands are written to an append-only file.
        aof_ok: whether the last write to it and its last rewrite succeeded.
        snapshot_ok: whether the last snapshot succeeded.
        started_s: Unix time.
    """

    used_memory_bytes: int
    max_memory_bytes: int
    aof_enabled: bool
    aof_ok: bool
    snapshot_ok: bool
    started_s: float
    connected_clients: int
    evicted_keys: int


def read_server_state(redis: Redis, now_s: float) -> ServerState:
    """The server's state.

    Args:
        now_s: the server's own clock.
    """
    facts: Any = redis.info()
    return server_state(facts, now_s)


def server_state(facts: Mapping[str, Any], now_s: float) -> ServerState:
    """The same from INFO's fields; of those that a server lacks nothing bad is said."""

    def number(name: str) -> int:
        return int(facts.get(name, 0))

    def is_ok(name: str) -> bool:
        return str(facts.get(name, "ok")) == "ok"

    return ServerState(
        used_memory_bytes=number("used_memory"),
        max_memory_bytes=number("maxmemory"),
        aof_enabled=number("aof_enabled") == 1,
        aof_ok=is_ok("aof_last_write_status") and is_ok("aof_last_bgrewrite_status"),
        snapshot_ok=is_ok("rdb_last_bgsave_status"),
        started_s=now_s - number("uptime_in_seconds"),
        connected_clients=number("connected_clients"),
        evicted_keys=number("evicted_keys"),
    )
