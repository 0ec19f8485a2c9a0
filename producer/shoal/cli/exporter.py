"""`shoal exporter`: the queues' metrics on a port, until it is told to stop."""

from __future__ import annotations

import time
from contextlib import ExitStack, closing

import click
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from shoal.cli.exits import EXIT_DONE, note, signals_kept
from shoal.cli.invocation import current_invocation
from shoal.cli.options import common_options
from shoal.embedded import EmbeddedRedis
from shoal.exporter import QueueCollector
from shoal.http import HttpServer
from shoal.logs import configure, json_line
from shoal.redis_url import redacted, resolve_url

DEFAULT_PORT = 9471
STOP_POLL_S = 0.2


@click.command()
@click.option(
    "--metrics-host",
    default="127.0.0.1",
    show_default=True,
    metavar="HOST",
    envvar="SHOAL_METRICS_HOST",
    help="Address of /metrics, /healthz and /readyz.",
)
@click.option(
    "--metrics-port",
    type=click.IntRange(0, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    metavar="PORT",
    envvar="SHOAL_METRICS_PORT",
    help="Port of /metrics; 0 picks a free one and prints it.",
)
@common_options
def exporter(*, metrics_host: str, metrics_port: int, redis_url: str | None) -> int:
    """Export the queues' metrics for Prometheus; one for each Redis."""
    log_format = current_invocation().log_format
    configure("info", log_format)
    with ExitStack() as stack:
        stop = stack.enter_context(signals_kept())
        url = resolve_url(redis_url)
        if url is None:
            url = stack.enter_context(EmbeddedRedis()).url
            note("using the embedded Redis of this user")
        collector = stack.enter_context(closing(QueueCollector(url)))
        registry = CollectorRegistry()
        for standard in (ProcessCollector, PlatformCollector, GCCollector):
            standard(registry=registry)
        registry.register(collector)
        server = stack.enter_context(
            HttpServer(
                metrics_host,
                metrics_port,
                registry,
                is_healthy=lambda: None,
                is_ready=collector.trouble,
            )
        )
        ready = f"ready: queues at {redacted(url)}, metrics at {server.url}/metrics"
        click.echo(json_line("info", ready) if log_format == "json" else ready)
        while not stop():
            time.sleep(STOP_POLL_S)
    return EXIT_DONE
