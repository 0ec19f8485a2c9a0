"""`shoal bulk --dry-run`: what a run would be, as a table or as JSON."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from shoal.bulk.dry_run import Counter, Forecast, counter, forecast
from shoal.bulk.opening import line_format_of
from shoal.bulk.plan import Plan
from shoal.bulk.readers import read_rows, survey
from shoal.bulk.streams import spool
from shoal.cli.exits import EXIT_DONE, note
from shoal.cli.serving import Serving, connected
from shoal.cli.show import duration, error_console, output_console, plain_table
from shoal.errors import ShoalError
from shoal.redis_url import redis_errors
from shoal.status import WorkerState, live_workers
from shoal.validation import parse
from shoal.wire import SamplingParams

MAX_MESSAGE_CHARS = 160


def dry_run(plan: Plan, queue: str, redis_url: str | None, *, as_json: bool) -> int:
    """Tell what this plan comes to. Nothing is written, nothing generated, no worker started."""
    with _readable(plan) as readable:
        parse(SamplingParams, dict(readable.sampling))
        found = survey(readable.source, readable.fields)
        rows = read_rows(readable.source, readable.row_defaults(found.kinds), readable.limit)
        with (
            _workers(queue, readable.model, redis_url) as (workers, count),
            error_console().status("reading") as status,
        ):

            def on_group(so_far: Forecast) -> None:
                status.update(f"{so_far.rows:,} of {found.num_rows:,} rows")

            result = forecast(
                rows,
                line_format_of(readable),
                count,
                skips_long=plan.on_long == "skip",
                on_group=on_group,
            )
    rates = [max(w.busy_tokens_per_s or 0.0, w.tokens_per_s or 0.0) for w in workers]
    record = _record(plan, result, len(workers), sum(rates) or None)
    if as_json:
        click.echo(json.dumps(record))
    else:
        _print(record, output_console())
    return EXIT_DONE


@contextlib.contextmanager
def _readable(plan: Plan) -> Iterator[Plan]:
    """The plan with standard input as a file, for as long as it is read."""
    if str(plan.source) != "-":
        yield plan
        return
    with tempfile.TemporaryDirectory(prefix="shoal-") as folder:
        is_table = not plan.fields.are_default
        yield replace(plan, source=spool(Path(folder), is_table=is_table))


@contextlib.contextmanager
def _workers(
    queue: str, model: str | None, redis_url: str | None
) -> Iterator[tuple[list[WorkerState], Counter | None]]:
    """Who serves the queue, and how they count; nobody, and a line why, if there is no Redis."""
    with contextlib.ExitStack() as stack:
        try:
            client = stack.enter_context(connected(redis_url))
            with redis_errors(client.redis_url):
                workers = live_workers(client.redis, queue)
        except ShoalError as error:
            note(f"no worker can be asked: {error}")
            workers = []
        count = None
        if workers:
            serving = stack.enter_context(Serving(client, queue, model, may_start=False))
            count = counter(client, queue, serving.requested_model())
        yield workers, count


def _record(
    plan: Plan, found: Forecast, num_workers: int, tokens_per_s: float | None
) -> dict[str, Any]:
    folder = next(path for path in (plan.output, *plan.output.absolute().parents) if path.exists())
    return {
        "rows": found.rows,
        "prompts": found.prompts,
        "refused": found.refused,
        "truncated": found.truncated,
        "skipped": found.skipped,
        "prompt_tokens": found.prompt_tokens,
        "tokens_are_counted": found.is_counted,
        "max_completion_tokens": found.max_completion_tokens,
        "workers": num_workers,
        "tokens_per_s": tokens_per_s,
        "max_s": found.max_completion_tokens / tokens_per_s if tokens_per_s else None,
        "max_output_bytes": found.max_output_bytes,
        "free_bytes": shutil.disk_usage(folder).free,
        "refusals": [
            {"code": one.code, "rows": one.rows, "line": one.line, "message": one.message}
            for one in sorted(found.refusals.values(), key=lambda one: -one.rows)
        ],
    }


def _print(record: dict[str, Any], console: Console) -> None:
    table = plain_table("Dry run: nothing is generated", "", "", console=console)
    table.show_header = False
    is_counted = record["tokens_are_counted"]
    how = "" if is_counted else " (reckoned from characters: no worker to count them)"
    table.add_row("rows", f"{record['rows']:,}")
    table.add_row("refused", f"{record['refused']:,}", style="red" if record["refused"] else "")
    for name in ("truncated", "skipped"):
        if record[name]:
            table.add_row(name, f"{record[name]:,}")
    table.add_row("prompts", f"{record['prompts']:,}")
    table.add_row("prompt tokens", f"{record['prompt_tokens']:,}{how}")
    table.add_row("completion tokens", f"{record['max_completion_tokens']:,} at most")
    table.add_row("time", _time(record))
    table.add_row("disk", _disk(record))
    console.print(table)
    for one in record["refusals"]:
        message = one["message"][:MAX_MESSAGE_CHARS]
        click.echo(f"{one['rows']:,} × {one['code']}, first in line {one['line']}: {message}")
    if not is_counted:
        click.echo(
            "Which prompts are too long only a worker can tell: start one with `shoal worker`."
        )


def _time(record: dict[str, Any]) -> str:
    if record["max_s"] is None:
        why = "has generated anything yet" if record["workers"] else "is there"
        return f"unknown: no worker {why}"
    num_workers = record["workers"]
    workers = "a worker's" if num_workers == 1 else f"{num_workers} workers'"
    rate = f"{record['tokens_per_s']:,.0f} tokens/s, {workers} mean while busy"
    return f"{duration(record['max_s'])} at most ({rate})"


def _disk(record: dict[str, Any]) -> str:
    text = f"{_size(record['max_output_bytes'])} at most before compression"
    return f"{text} ({_size(record['free_bytes'])} free)"


def _size(num_bytes: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "bytes" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
