"""All that is in Redis, such that two runs of the same job can be compared: times and ids aside."""

from __future__ import annotations

import re
import time
from typing import Any

import redis

_EXECUTION_ID = re.compile(r"\b[0-9a-f]{32}\b")
_TIMES = {
    *("created_at", "enqueued_at", "started_at", "ended_at", "last_heartbeat"),
    *("execution_started_at", "execution_ended_at"),
}
_TRACEBACKS = {"exc_string"}
# The worker's own, and locks of RQ's housekeeping.
_NOT_OF_JOBS = ("rq:worker", "rq:clean_", "rq:shoal:")


def rq_content(connection: redis.Redis) -> dict[str, Any]:
    """Each key with its value and time to live, the latter and scores in minutes from now."""
    content = {}
    for key in sorted(connection.scan_iter()):
        name = key.decode()
        if not name.startswith(_NOT_OF_JOBS):
            ttl: Any = connection.ttl(key)
            content[_plain(name)] = (_value(connection, key), round(ttl / 60))
    return content


def _value(connection: Any, key: bytes) -> Any:
    match connection.type(key):
        case b"hash":
            return _fields(connection.hgetall(key))
        case b"zset":
            now = time.time()
            members = connection.zrange(key, 0, -1, withscores=True)
            return {_plain(member.decode()): round((score - now) / 60) for member, score in members}
        case b"stream":
            return [_fields(fields) for _id, fields in connection.xrange(key)]
        case b"list":
            return connection.lrange(key, 0, -1)
        case b"set":
            return connection.smembers(key)
        case b"string":
            return connection.get(key)
        case other:
            raise AssertionError(other)


def _fields(fields: dict[bytes, bytes]) -> dict[str, Any]:
    return {name.decode(): _field(name.decode(), value) for name, value in fields.items()}


def _field(name: str, value: bytes) -> Any:
    if name in _TIMES:
        return bool(value)
    if name in _TRACEBACKS:
        return "a traceback"
    try:
        return _plain(value.decode())
    except UnicodeDecodeError:
        return value


def _plain(text: str) -> str:
    return _EXECUTION_ID.sub("an id", text)
