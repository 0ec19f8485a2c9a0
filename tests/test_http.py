"""The HTTP server of metrics: its three pages, its addresses, its end."""

from __future__ import annotations

import gzip
import logging
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message

import pytest
from prometheus_client import CollectorRegistry, Counter

from shoal.errors import ShoalError
from shoal.http import HttpServer


@dataclass
class Checks:
    """What the server asks; a test sets it."""

    unhealthy: str | None = None
    unready: str | None = None


@dataclass
class Page:
    """What the server answered."""

    status: int
    headers: Message
    body: bytes


@pytest.fixture
def checks() -> Checks:
    return Checks()


@pytest.fixture
def registry() -> CollectorRegistry:
    registry = CollectorRegistry()
    Counter("shoal_x_total", "X.", registry=registry).inc(7)
    return registry


@pytest.fixture
def server(registry: CollectorRegistry, checks: Checks) -> Iterator[HttpServer]:
    with serve(registry, checks) as server:
        yield server


def test_metrics_are_in_prometheus_text_format(server: HttpServer) -> None:
    page = get(f"{server.url}/metrics")

    assert page.status == 200
    assert page.headers["Content-Type"].startswith("text/plain; version=")
    assert "shoal_x_total 7.0" in page.body.decode().splitlines()


def test_metrics_are_in_openmetrics_format_for_who_accepts_it(server: HttpServer) -> None:
    page = get(f"{server.url}/metrics", Accept="application/openmetrics-text; version=1.0.0")

    assert page.headers["Content-Type"].startswith("application/openmetrics-text")
    assert page.body.endswith(b"# EOF\n")


def test_metrics_are_compressed_for_who_accepts_it(server: HttpServer) -> None:
    page = get(f"{server.url}/metrics", **{"Accept-Encoding": "gzip"})

    assert page.headers["Content-Encoding"] == "gzip"
    assert b"shoal_x_total 7.0" in gzip.decompress(page.body)


def test_a_query_does_not_hide_a_page(server: HttpServer) -> None:
    assert get(f"{server.url}/healthz?verbose=1").status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_all_well_is_200_ok(server: HttpServer, path: str) -> None:
    page = get(server.url + path)

    assert (page.status, page.body) == (200, b"ok\n")
    assert page.headers.get_content_type() == "text/plain"


def test_a_sick_engine_is_503_with_the_reason(server: HttpServer, checks: Checks) -> None:
    checks.unhealthy = "the engine has been silent for 31 s"

    page = get(f"{server.url}/healthz")

    assert (page.status, page.body) == (503, b"the engine has been silent for 31 s\n")
    assert page.headers.get_content_type() == "text/plain"
    assert get(f"{server.url}/readyz").status == 200


def test_not_ready_is_503_with_the_reason(server: HttpServer, checks: Checks) -> None:
    checks.unready = "the model is being loaded"

    page = get(f"{server.url}/readyz")

    assert (page.status, page.body) == (503, b"the model is being loaded\n")
    assert get(f"{server.url}/healthz").status == 200


@pytest.mark.parametrize("path", ["/", "/favicon.ico", "/metrics/", "/healthz/x"])
def test_any_other_path_is_404_and_names_the_pages(server: HttpServer, path: str) -> None:
    page = get(server.url + path)

    assert page.status == 404
    assert b"/metrics, /healthz and /readyz" in page.body


def test_head_answers_with_headers_alone(server: HttpServer) -> None:
    page = get(f"{server.url}/healthz", method="HEAD")

    assert (page.status, page.body) == (200, b"")
    assert page.headers["Content-Length"] == "3"


def test_a_check_that_fails_is_500_and_the_server_goes_on(
    registry: CollectorRegistry, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> str | None:
        raise RuntimeError("no such thing")

    with HttpServer("127.0.0.1", 0, registry, is_healthy=broken, is_ready=lambda: None) as server:
        page = get(f"{server.url}/healthz")

        assert page.status == 500
        assert b"no such thing" not in page.body
        assert "no such thing" in caplog.text
        assert get(f"{server.url}/readyz").status == 200


def test_requests_write_nothing_to_log_or_terminal(
    server: HttpServer, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO):
        get(f"{server.url}/metrics")
        get(f"{server.url}/nothing")

    assert caplog.text == ""
    assert capfd.readouterr() == ("", "")


def test_a_client_that_sends_nothing_holds_up_nobody(server: HttpServer) -> None:
    with socket.create_connection(("127.0.0.1", server.port)):
        assert get(f"{server.url}/healthz").status == 200


def test_port_0_picks_a_free_port_and_says_which(server: HttpServer) -> None:
    assert server.port > 0
    assert server.url == f"http://127.0.0.1:{server.port}"


def test_an_ipv6_address_is_served(registry: CollectorRegistry, checks: Checks) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with serve(registry, checks, "::1") as server:
        assert server.url == f"http://[::1]:{server.port}"
        assert get(f"{server.url}/healthz").status == 200


def test_a_name_is_served_as_well_as_an_address(
    registry: CollectorRegistry, checks: Checks
) -> None:
    with serve(registry, checks, "localhost") as server:
        assert get(f"{server.url}/healthz").status == 200


def test_a_taken_port_is_one_clear_line(
    server: HttpServer, registry: CollectorRegistry, checks: Checks
) -> None:
    with pytest.raises(ShoalError) as raised:
        serve(registry, checks, port=server.port)

    assert str(raised.value) == (
        f"port {server.port} on 127.0.0.1 is taken; choose another with --metrics-port, "
        "or 0 for a free one"
    )


def test_an_address_that_is_not_ours_is_one_clear_line(
    registry: CollectorRegistry, checks: Checks
) -> None:
    with pytest.raises(ShoalError, match=r"^cannot serve metrics on port 0 of 192\.0\.2\.1: .*--"):
        serve(registry, checks, "192.0.2.1")


def test_close_is_quick_and_frees_the_port(registry: CollectorRegistry, checks: Checks) -> None:
    server = serve(registry, checks)
    with socket.create_connection(("127.0.0.1", server.port)):  # An open connection is no reason.
        started_s = time.monotonic()
        server.close()
        assert time.monotonic() - started_s < 1.0

    with serve(registry, checks, port=server.port) as other:
        assert get(f"{other.url}/healthz").status == 200


def test_close_can_be_called_twice(registry: CollectorRegistry, checks: Checks) -> None:
    server = serve(registry, checks)

    server.close()
    server.close()


def serve(
    registry: CollectorRegistry, checks: Checks, host: str = "127.0.0.1", port: int = 0
) -> HttpServer:
    return HttpServer(
        host,
        port,
        registry,
        is_healthy=lambda: checks.unhealthy,
        is_ready=lambda: checks.unready,
    )


def get(url: str, method: str = "GET", **headers: str) -> Page:
    # Without an opener of our own, a proxy set in the environment would answer.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, headers=headers, method=method)
    try:
        with opener.open(request, timeout=10) as answer:
            return Page(answer.status, answer.headers, answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return Page(error.code, error.headers, error.read())


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False
