"""A Redis that sentinels watch: one address for all of them, and a client of whoever is master now.

`redis+sentinel://USER:PASSWORD@HOST:PORT,HOST:PORT/SERVICE/DB?OPTIONS`, and `rediss+sentinel` where
all of them speak TLS. User and password are the server's; the sentinels' own, if they have any, are
the options `sentinel_username` and `sentinel_password`. Owns that form and the two clients; the
time limits and retries are `redis_url`'s.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from threading import Lock
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

import redis
import redis.asyncio
from redis.asyncio.sentinel import Sentinel as AsyncSentinel
from redis.connection import parse_url
from redis.sentinel import Sentinel

SCHEMES = ("redis+sentinel", "rediss+sentinel")
OPTIONS = frozenset({"sentinel_username", "sentinel_password"})
DEFAULT_PORT = 26379

_HOST = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::(\d{1,5}))?")
_SHARED = (
    "socket_timeout",
    "socket_connect_timeout",
)  # Limits of the server's that sentinels share.


@dataclass(frozen=True, slots=True)
class SentinelAddress:
    """What such a URL says.

    Attributes:
        hosts: the sentinels.
        service: the name under which they know the master.
        options: of connections to the master; own_options: of those to the sentinels.
    """

    hosts: tuple[tuple[str, int], ...]
    service: str
    options: dict[str, Any]
    own_options: dict[str, Any]

    def client(self, **options: Any) -> redis.Redis:
        """A client of the master, which asks again who that is with each new connection."""
        merged = options | self.options
        sentinel = _Sentinel(self.hosts, sentinel_kwargs=self._own(merged))
        client: redis.Redis = sentinel.master_for(  # type: ignore[no-untyped-call]
            self.service, **merged
        )
        return client

    def async_client(self, **options: Any) -> redis.asyncio.Redis:
        """The twin of `client` for asyncio."""
        merged = options | self.options
        sentinel = _AsyncSentinel(self.hosts, sentinel_kwargs=self._own(merged))
        client: redis.asyncio.Redis = sentinel.master_for(self.service, **merged)
        return client

    def _own(self, options: dict[str, Any]) -> dict[str, Any]:
        shared = {name: options[name] for name in _SHARED if name in options}
        return shared | self.own_options


class _Sentinel(Sentinel):
    """Asks one connection after the other, and keeps no connection to a sentinel: nobody else
    would close them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._asking = Lock()

    def discover_master(self, service_name: str) -> Any:
        with self._asking:
            try:
                return super().discover_master(service_name)  # type: ignore[no-untyped-call]
            finally:
                for client in self.sentinels:
                    client.close()


class _AsyncSentinel(AsyncSentinel):
    """The same for asyncio."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self._asking = asyncio.Lock()

    async def discover_master(self, service_name: str) -> Any:
        async with self._asking:
            try:
                return await super().discover_master(service_name)
            finally:
                for client in self.sentinels:
                    await client.aclose()


def is_sentinel(url: str) -> bool:
    """Whether a URL names sentinels."""
    return url.partition("://")[0] in SCHEMES


def parse_sentinel_url(url: str) -> SentinelAddress:
    """What a sentinel URL says.

    Raises:
        ValueError: it cannot be read; the message completes "the URL ...".
    """
    parts = urlsplit(url)
    userinfo, at, hosts = parts.netloc.rpartition("@")
    service, _, db = parts.path.removeprefix("/").partition("/")
    if not service:
        msg = "names no service: write it as in redis+sentinel://host:26379/mymaster/0"
        raise ValueError(msg)
    if not re.fullmatch(r"\d*", db):
        msg = (
            "has a bad database: it must be a number, as in redis+sentinel://host:26379/mymaster/0"
        )
        raise ValueError(msg)
    query = dict(parse_qsl(parts.query, keep_blank_values=True))
    own: dict[str, Any] = {
        name.removeprefix("sentinel_"): query.pop(name) for name in OPTIONS & query.keys()
    }
    # redis-py reads the rest, and converts its options, as in a URL with one host.
    scheme = parts.scheme.removesuffix("+sentinel")
    options: dict[str, Any] = dict(
        parse_url(f"{scheme}://{userinfo}{at}host/{db or 0}?{urlencode(query)}")
    )
    del options["host"]
    if options.pop("connection_class", None) is not None:
        options["ssl"] = own["ssl"] = True
        own |= {name: value for name, value in options.items() if name.startswith("ssl_")}
    found = tuple(_host(text) for text in hosts.split(","))
    return SentinelAddress(found, unquote(service), options, own)


def _host(text: str) -> tuple[str, int]:
    match = _HOST.fullmatch(text)
    port = int(match[2] or DEFAULT_PORT) if match else 0
    if match is None or not 0 < port < 65536:
        msg = f"has a bad sentinel {text!r}: write HOST:PORT, several by commas"
        raise ValueError(msg)
    return match[1].strip("[]"), port
