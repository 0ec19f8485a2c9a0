"""`shoal worker`: settings in, a serving worker out."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import click
from prometheus_client import CollectorRegistry, GCCollector, PlatformCollector, ProcessCollector

from shoal.cli.exits import note
from shoal.cli.invocation import current_invocation
from shoal.embedded import EmbeddedRedis
from shoal.errors import ShoalError
from shoal.exporter import QueueCollector
from shoal.http import HttpServer
from shoal.logs import configure, json_line
from shoal.redis_url import redacted, resolve_url
from shoal_worker.engine_link import EngineFailedError
from shoal_worker.events import EngineLoaded, Event
from shoal_worker.fleet import ALL_DEVICES, count_gpus, serve_fleet
from shoal_worker.messages import Ready
from shoal_worker.metrics import PrometheusMetrics
from shoal_worker.rq_worker import Worker
from shoal_worker.setting_options import setting_options
from shoal_worker.settings import WorkerSettings, read_settings


@click.command()
@setting_options(WorkerSettings)
def worker(**values: Any) -> None:
    """Serve a model: claim jobs, generate, write results back."""
    if values["model"] is None:
        raise click.UsageError(
            "no model: name a folder or hub id with --model, or try --model demo, the small one "
            "that comes with Shoal"
        )
    settings = read_settings(values)
    current_invocation().log_format = settings.log_format
    configure(settings.log_level, settings.log_format)
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    sys.exit(serve_all(settings) if settings.device == ALL_DEVICES else serve(settings))


def serve_all(settings: WorkerSettings) -> int:
    """Run one worker process for each GPU; the worst of their exit codes.

    Raises:
        ShoalError: there is no GPU, or there are more than ports.
    """
    num_gpus = count_gpus()
    with _redis_url(settings) as url:
        return serve_fleet(settings, url, num_gpus)


@contextmanager
def _redis_url(settings: WorkerSettings) -> Iterator[str]:
    """The address to use; the embedded Redis lasts as long as the block."""
    url = resolve_url(settings.redis)
    if url is not None:
        yield url
        return
    with EmbeddedRedis() as embedded:
        note("using the embedded Redis of this user")
        yield embedded.url


def serve(settings: WorkerSettings) -> int:
    """Run one worker until it is told to stop; the exit code.

    Raises:
        ShoalError: Redis does not answer, a port is taken, or the engine cannot run.
    """
    with ExitStack() as stack:
        url = stack.enter_context(_redis_url(settings))
        registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=registry)
        metrics = _LateMetrics(registry, settings)
        process = Worker(settings, url, subscribers=(metrics,))
        # The process that holds the model and does the work is the child.
        ProcessCollector("shoal_engine", lambda: process.engine_pid or "", registry=registry)
        if settings.export_queues:
            registry.register(stack.enter_context(closing(QueueCollector(url))))
        server = stack.enter_context(
            HttpServer(
                settings.metrics_host,
                settings.metrics_port,
                registry,
                is_healthy=process.healthy,
                is_ready=process.ready,
            )
        )

        def announce(ready: Ready) -> None:
            text = (
                f"ready: {ready.model_name} on {ready.device} in {ready.dtype}, {ready.num_slots} "
                f"slots, queues {', '.join(settings.queues)} at {redacted(url)}, metrics at "
                f"{server.url}/metrics, loaded in {ready.load_s:.1f} s"
            )
            as_json = settings.log_format == "json"
            click.echo(json_line("info", text, "shoal.worker") if as_json else text)

        try:
            return process.run(announce)
        except EngineFailedError as error:
            raise ShoalError(str(error)) from None


class _LateMetrics:
    """The metrics, made when the engine has said its model's name, which labels them all."""

    def __init__(self, registry: CollectorRegistry, settings: WorkerSettings) -> None:
        self._registry = registry
        self._settings = settings
        self._metrics: PrometheusMetrics | None = None

    def __call__(self, event: Event) -> None:
        if self._metrics is None and isinstance(event, EngineLoaded):
            self._metrics = PrometheusMetrics(
                self._registry,
                model_name=event.model_name,
                queues=self._settings.queues,
                lanes=event.lanes,
            )
        if self._metrics is not None:
            self._metrics(event)
