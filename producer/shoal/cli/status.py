"""`shoal status`: how a snapshot of queues and workers looks."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table

from shoal.cli.exits import EXIT_DONE
from shoal.cli.options import common_options
from shoal.cli.serving import connected
from shoal.cli.show import MISSING, duration, output_console, plain_table, share
from shoal.redis_url import redis_errors
from shoal.status import REGISTRIES, Snapshot, read_snapshot

WATCH_INTERVAL_S = 2.0


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print it as one JSON object.")
@click.option("--watch", is_flag=True, help="Look again every two seconds, until interrupted.")
@common_options
def status(*, as_json: bool, watch: bool, redis_url: str | None) -> int:
    """Show queues, workers, bulk runs and recent failures."""
    with connected(redis_url) as client:

        def read() -> Snapshot:
            with redis_errors(client.redis_url):
                return read_snapshot(client.redis)

        console = output_console()
        if watch and console.is_terminal and not as_json:
            _watch(read, console)
        while True:
            if as_json:
                click.echo(json.dumps(as_record(read())))
            else:
                console.print(_rendered(read(), console))
            if not watch:
                return EXIT_DONE
            time.sleep(WATCH_INTERVAL_S)


def as_record(snapshot: Snapshot) -> dict[str, object]:
    """A snapshot as plain JSON values."""
    record = asdict(snapshot)
    for worker, state in zip(record["workers"], snapshot.workers, strict=True):
        worker["alive"] = state.is_alive
    return record


def _watch(read: Callable[[], Snapshot], console: Console) -> None:
    with Live(_rendered(read(), console), console=console, auto_refresh=False) as live:
        while True:
            time.sleep(WATCH_INTERVAL_S)
            live.update(_rendered(read(), console), refresh=True)


def _rendered(snapshot: Snapshot, console: Console) -> RenderableType:
    parts: list[RenderableType] = []
    if any(not queue.is_blank for queue in snapshot.queues):
        parts.append(_queues(snapshot, console))
    else:
        parts.append("The queues are empty.")
    if snapshot.workers:
        parts.append(_workers(snapshot, console))
    else:
        parts.append("No worker is running. Start one: shoal worker --model demo")
    if snapshot.runs:
        parts.append(_runs(snapshot, console))
    if snapshot.failures:
        parts.append(_failures(snapshot, console))
    return Group(*parts)


def _queues(snapshot: Snapshot, console: Console) -> Table:
    table = plain_table("Queues (jobs)", "queue", "waiting", "oldest", *REGISTRIES, console=console)
    for column in table.columns[1:]:
        column.justify = "right"
    for queue in snapshot.queues:
        counts = [str(queue.registries.get(name, 0)) for name in REGISTRIES]
        table.add_row(queue.name, str(queue.depth), duration(queue.oldest_age_s), *counts)
    return table


def _workers(snapshot: Snapshot, console: Console) -> Table:
    columns = ("worker", "state", "model", "device", "running", "tokens/s", "padding", "queues")
    table = plain_table("Workers", *columns, console=console)
    for worker in snapshot.workers:
        running = _text(worker.running) + (f"/{worker.slots}" if worker.slots is not None else "")
        table.add_row(
            worker.name,
            worker.state if worker.is_alive else "gone",
            _text(worker.model),
            _text(worker.device),
            running,
            _text(worker.tokens_per_s),
            share(worker.padding_ratio),
            ", ".join(worker.queues),
        )
    return table


def _runs(snapshot: Snapshot, console: Console) -> Table:
    columns = ("output", "state", "rows", "failed", "tokens/s", "padding", "at limit", "left")
    table = plain_table("Bulk runs", *columns, console=console)
    names = Counter(run.output for run in snapshot.runs)
    for run in snapshot.runs:
        table.add_row(
            # Another run of that name, in another folder: their jobs are named by the run's id.
            run.output if names[run.output] == 1 else f"{run.output} ({run.run_id})",
            f"silent for {duration(run.age_s)}" if run.is_stale else run.status,
            f"{run.rows_done:,} of {run.rows_total:,}",
            f"{run.rows_failed:,}",
            f"{run.tokens_per_s:,.0f} (mean {run.mean_tokens_per_s:,.0f})",
            share(run.padding_ratio),
            share(run.limit_ratio),
            duration(run.eta_s if run.status == "running" else None),
        )
    return table


def _failures(snapshot: Snapshot, console: Console) -> Table:
    table = plain_table("Recent failures", "job", "queue", "reason", console=console)
    for failure in snapshot.failures:
        table.add_row(failure.job_id, failure.queue, failure.reason)
    return table


def _text(value: object) -> str:
    return MISSING if value is None else str(value)
