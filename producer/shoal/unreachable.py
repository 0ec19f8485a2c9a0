"""Why no Redis answers, in plain words, and what to do about it.

Owns the words for each kind of failure. It knows no connections: it is given an error and says what
it means to the person who gave the address.
"""

from __future__ import annotations

import socket
import ssl

import redis
from redis.exceptions import AuthenticationError, BusyLoadingError, NoPermissionError
from redis.sentinel import MasterNotFoundError

_START = "Start one, or leave --redis out to use the embedded one"
# A server without TLS waits in silence for the rest of a greeting; one with TLS hangs up.
_CHECK_ADDRESS = "Check host, port and firewall, and TLS: rediss:// with it, redis:// without"
_CHECK_TLS = "Check that the server has TLS, and the ssl_ca_certs of the URL"

# First match wins.
_REASONS: tuple[tuple[type[BaseException], str, str], ...] = (
    (AuthenticationError, "{error}", "Check user name and password in the URL"),
    (NoPermissionError, "{error}", "Check the rights of this user"),
    (
        MasterNotFoundError,
        "no sentinel answers that knows a living master of that name",
        "Check the sentinels' addresses, their password and the service's name",
    ),
    (BusyLoadingError, "it is still loading its data", "Try again in a moment"),
    (socket.gaierror, "the host name is not known", "Check the host name"),
    (ssl.SSLError, "TLS failed, {error}", _CHECK_TLS),
    (FileNotFoundError, "there is no such socket file", _START),
    (ConnectionRefusedError, "connection refused", _START),
    (PermissionError, "permission denied", "Check owner and mode of the socket file"),
    (redis.TimeoutError, "no answer within {timeout_s:g} s", _CHECK_ADDRESS),
)


def explain(error: BaseException, url: str, socket_timeout_s: float) -> tuple[str, str]:
    """Why there is no connection, and what to do about it, in plain words."""
    # redis-py wraps the system's own error, which is the clearer one, in its ConnectionError.
    for cause in (error, error.__cause__ or error.__context__):
        if isinstance(cause, FileNotFoundError) and url.startswith("rediss:"):
            return "a certificate file that the URL names does not exist", _CHECK_TLS
        for kind, reason, advice in _REASONS:
            if isinstance(cause, kind):
                return reason.format(error=_words(cause), timeout_s=socket_timeout_s), advice
    return _words(error), _CHECK_ADDRESS


def _words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message
    if isinstance(error, ssl.SSLError):
        return (error.reason or str(error)).replace("_", " ").lower()
    first_line = str(error).partition("\n")[0].rstrip(".")
    return first_line[:1].lower() + first_line[1:]
