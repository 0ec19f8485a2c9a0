"""How every part of Shoal gets its Redis client: at which address, within which time limits.

Owns the order in which an address is looked up, what an address may look like, how it is shown
without its password, and the time limits of every client. It doesn't know what is kept in Redis,
nor how the embedded server runs: to it, that is an address as any other. Addresses that name
sentinels are read in `sentinel`; why nothing answers is said in `unreachable`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, urlsplit

import redis
import redis.asyncio
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import AbstractBackoff, ExponentialWithJitterBackoff, NoBackoff
from redis.exceptions import RedisError
from redis.retry import Retry

from shoal.errors import QueueFull, RedisUnavailable
from shoal.sentinel import OPTIONS as SENTINEL_OPTIONS
from shoal.sentinel import is_sentinel, parse_sentinel_url
from shoal.unreachable import explain

SCHEMES = ("redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel")
VARIABLES = ("SHOAL_REDIS_URL", "REDIS_URL")
FILE_VARIABLE = "SHOAL_REDIS_URL_FILE"  # A secret mounted as a file, where variables are shown.
HEALTH_CHECK_INTERVAL_S = 30
BACKOFF_BASE_S = 0.05
SOCKET_TIMEOUT_S = 5.0
BACKOFF_CAP_S = 1.0

# What redis-py takes from a URL and Shoal can live with. `decode_responses` or `retry` would change
# what replies look like or how often a command is sent, and a misspelt name would be a TypeError.
_OPTIONS = frozenset({
    "client_name", "db", "health_check_interval", "max_connections", "password", "protocol",
    "socket_connect_timeout", "socket_keepalive", "socket_timeout", "username",
    "ssl_ca_certs", "ssl_ca_data", "ssl_ca_path", "ssl_cert_reqs", "ssl_certfile",
    "ssl_check_hostname", "ssl_ciphers", "ssl_keyfile", "ssl_min_version", "ssl_password",
})  # fmt: skip

# A server that restarts is waited for; one that is silent has had its time.
_FIRST_CONTACT_RETRIES = (redis.ConnectionError,)


def resolve_url(explicit: str | None = None, environ: Mapping[str, str] = os.environ) -> str | None:
    """The Redis URL to use: the one given, SHOAL_REDIS_URL (or the first line of the file that
    SHOAL_REDIS_URL_FILE names), REDIS_URL; None means the embedded one.

    A variable that is set but empty counts as not set; an empty `explicit` is refused, since
    `--redis "$URL"` with an unset variable must not end up in another Redis than was meant.

    Raises:
        RedisUnavailable: the URL cannot be used, or there is none and the embedded Redis is
            forbidden.
    """
    if explicit is not None:
        _check(explicit)
        return explicit
    if path := environ.get(FILE_VARIABLE):
        if environ.get("SHOAL_REDIS_URL"):
            raise RedisUnavailable(f"SHOAL_REDIS_URL and {FILE_VARIABLE} are both set; unset one")
        from_file = _read_url(path)
        _check(from_file, source=f"{FILE_VARIABLE}: ")
        return from_file
    for name in VARIABLES:
        if url := environ.get(name):
            _check(url, source=f"{name}: ")
            return url
    require_embedded_allowed(environ)
    return None


def _read_url(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "it is not text"
        raise RedisUnavailable(f"{FILE_VARIABLE}: {path} cannot be read: {reason}") from None


def embedded_allowed(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the embedded Redis may be used: SHOAL_EMBEDDED=0 (or false, no, off) forbids it."""
    return environ.get("SHOAL_EMBEDDED", "").strip().lower() not in {"0", "false", "no", "off"}


def require_embedded_allowed(environ: Mapping[str, str] = os.environ) -> None:
    """Raises RedisUnavailable where no URL is named and the embedded Redis is forbidden."""
    if not embedded_allowed(environ):
        raise RedisUnavailable(
            f"no Redis is named, and SHOAL_EMBEDDED={environ['SHOAL_EMBEDDED']} forbids the "
            f"embedded one: give --redis or set SHOAL_REDIS_URL or {FILE_VARIABLE}"
        )


def redacted(url: str) -> str:
    """The URL as it may be shown: passwords are replaced by `***`."""
    scheme, separator, rest = url.rpartition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    tail = rest[len(authority) :]
    if "@" in tail and not (scheme == "unix" and not authority):
        # A password with an unencoded / ? or #: where it ends is anybody's guess.
        return f"{scheme}{separator}***"
    userinfo, at, address = authority.rpartition("@")
    user, colon, _ = userinfo.partition(":")
    tail = re.sub(r"([?&][^=&]*password=)[^&]*", r"\1***", tail, flags=re.IGNORECASE)
    shown_user = f"{user}:***" if colon else "***"
    return f"{scheme}{separator}{shown_user if at else ''}{at}{address}{tail}"


# A replica after a failover, a disk that is full, replicas that are gone: it may work later.
_REFUSALS = ("READONLY", "MISCONF", "NOREPLICAS", "MASTERDOWN", "BUSY")


@contextmanager
def redis_errors(url: str) -> Iterator[None]:
    """Turn redis-py's errors into Shoal's.

    Raises:
        QueueFull: Redis is out of memory. RedisUnavailable: it does not answer, or refuses for now.
    """
    try:
        yield
    except redis.OutOfMemoryError:
        raise QueueFull(
            f"Redis at {redacted(url)} is out of memory and takes no more; wait for workers to "
            "catch up, or raise its maxmemory"
        ) from None
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise RedisUnavailable(f"Redis at {redacted(url)} does not answer: {error}") from None
    except redis.ResponseError as error:
        refuses_now = isinstance(error, redis.ReadOnlyError)
        if not refuses_now and not any(word in str(error) for word in _REFUSALS):
            raise
        raise RedisUnavailable(f"Redis at {redacted(url)} refuses for now: {error}") from None


def connect(
    url: str, *, socket_timeout_s: float = SOCKET_TIMEOUT_S, retries: int = 3
) -> redis.Redis:
    """A client of the Redis at `url`, which has answered a PING.

    Args:
        url: a redis://, rediss://, unix:// or sentinel URL; options in it win over the ones here.
        socket_timeout_s: limit for connecting, and for the wait for each reply.
        retries: how often a command is sent again after a lost connection or a time-out, with
            exponential back-off. 0 gives a client that never sends a command twice by itself,
            for commands that are not idempotent.

    Raises:
        RedisUnavailable: nothing answers there, or not to us; the message says why.
    """
    _check(url)
    client: redis.Redis | None = None
    try:
        options = _client_options(url, socket_timeout_s, retries)
        options["retry"] = Retry(NoBackoff(), 0)
        if is_sentinel(url):
            client = parse_sentinel_url(url).client(**options)
        else:
            client = redis.Redis.from_url(url, **options)
        first_contact = Retry(_backoff(), retries, _FIRST_CONTACT_RETRIES)
        first_contact.call_with_retry(client.ping, lambda _: None)
        client.set_retry(Retry(_backoff(), retries))
    except BaseException as error:
        if client is not None:
            client.close()
        if isinstance(error, (RedisError, OSError, ValueError)):
            raise _unavailable(url, error, socket_timeout_s) from error
        raise
    return client


async def connect_async(
    url: str, *, socket_timeout_s: float = SOCKET_TIMEOUT_S, retries: int = 3
) -> redis.asyncio.Redis:
    """The twin of `connect` for asyncio: same arguments, same errors."""
    _check(url)
    client: redis.asyncio.Redis | None = None
    try:
        options = _client_options(url, socket_timeout_s, retries)
        options["retry"] = AsyncRetry(NoBackoff(), 0)
        if is_sentinel(url):
            client = parse_sentinel_url(url).async_client(**options)
        else:
            client = redis.asyncio.Redis.from_url(url, **options)
        first_contact = AsyncRetry(_backoff(), retries, _FIRST_CONTACT_RETRIES)
        await first_contact.call_with_retry(client.ping, _nothing)
        client.set_retry(AsyncRetry(_backoff(), retries))
    except BaseException as error:
        if client is not None:
            await client.aclose()
        if isinstance(error, (RedisError, OSError, ValueError)):
            raise _unavailable(url, error, socket_timeout_s) from error
        raise
    return client


async def _nothing(_: Exception) -> None:
    pass


def _backoff() -> AbstractBackoff:
    # Jitter: the workers of a Redis that comes back must not all knock at the same moment.
    return ExponentialWithJitterBackoff(cap=BACKOFF_CAP_S, base=BACKOFF_BASE_S)


def _client_options(url: str, socket_timeout_s: float, retries: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "socket_timeout": socket_timeout_s,
        "socket_connect_timeout": socket_timeout_s,
    }
    if retries == 0:
        # A connection that died while idle is found before a command is on its way. With retries
        # that is no use, and redis-py would retry the check within each retry: 16 time-outs, not 4.
        options["health_check_interval"] = HEALTH_CHECK_INTERVAL_S
    if not url.startswith("unix:"):
        options["socket_keepalive"] = True
    return options


def _check(url: str, source: str = "") -> None:
    """Refuses a URL that redis-py would misread; it drops what it cannot parse without a word."""
    if complaint := _complaint(url):
        raise RedisUnavailable(f"{source}the Redis URL {redacted(url)!r} {complaint}")


def _complaint(url: str) -> str | None:
    """What is wrong with the URL, or None."""
    try:
        parts = urlsplit(url)
    except ValueError as error:
        return f"cannot be read: {error}"
    if parts.scheme not in SCHEMES or "://" not in url:
        return "is none: it must begin with redis://, rediss:// or unix://"
    address = _address_complaint(url, parts)
    if address is not None:
        return address
    names = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    if is_sentinel(url):
        names -= SENTINEL_OPTIONS
    if unknown := sorted(names - _OPTIONS):
        return f"has an option that Shoal does not take: {', '.join(unknown)}"
    return None


def _address_complaint(url: str, parts: SplitResult) -> str | None:
    if parts.scheme == "unix":
        return _unix_complaint(parts)
    if "@" in parts.path + parts.query + parts.fragment:
        return "cannot be read: write / ? # @ inside a password as %2F %3F %23 %40"
    if not is_sentinel(url):
        return _tcp_complaint(parts)
    try:
        parse_sentinel_url(url)
    except ValueError as error:
        return str(error)
    return None


def _unix_complaint(parts: SplitResult) -> str | None:
    if not parts.path.strip("/") or (parts.netloc and "@" not in parts.netloc):
        return "names no socket file: write it with three slashes, as in unix:///run/redis.sock"
    return None


def _tcp_complaint(parts: SplitResult) -> str | None:
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        return "has a bad port: it must be a number from 1 to 65535"
    if not re.fullmatch(r"/?\d*", parts.path):
        return "has a bad database: it must be a number, as in redis://localhost:6379/0"
    return None


def _unavailable(url: str, error: BaseException, socket_timeout_s: float) -> RedisUnavailable:
    reason, advice = explain(error, url, socket_timeout_s)
    return RedisUnavailable(f"no Redis answers at {redacted(url)}: {reason}. {advice}")
