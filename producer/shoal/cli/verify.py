"""`shoal verify`: rows of an output made again and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from shoal.bulk.outputs import WrittenRecord, WrittenRun, written_run
from shoal.bulk.plan import Workers
from shoal.bulk.verification import Ending, Findings, Verification, sample_of
from shoal.cli.exits import (
    EXIT_DONE,
    EXIT_SIGNAL_BASE,
    EXIT_SOME_FAILED,
    EXIT_TIMEOUT,
    StopRequest,
    note,
    signals_kept,
)
from shoal.cli.options import common_options, model_option
from shoal.cli.serving import Serving, connected
from shoal.cli.show import output_console, plain_table
from shoal.client import Client
from shoal.wire import QUEUE_BULK

DEFAULT_ROWS = 100


def _rows(_ctx: click.Context, _parameter: click.Parameter, value: str) -> int | None:
    """How many rows; None: all."""
    if value == "all":
        return None
    if not value.isdecimal() or int(value) < 1:
        raise click.BadParameter(f"{value!r} is neither a number of rows, from 1, nor `all`")
    return int(value)


@click.command()
@click.argument("output", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.option(
    "--rows",
    callback=_rows,
    default=str(DEFAULT_ROWS),
    show_default=True,
    metavar="N|all",
    help="How many rows to make again, drawn at random.",
)
@click.option("--sample-seed", type=int, metavar="S", help="The same rows each time.")
@model_option
@click.option(
    "--local-workers", type=click.IntRange(1, 64), metavar="N", help="Workers to start for it."
)
@click.option(
    "--mixed",
    is_flag=True,
    help="Let workers of any kind make them again: shows whether kinds differ.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as one JSON object.")
@click.option("--queue", default=QUEUE_BULK, show_default=True, help="Where to submit.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds for all of it.")
@common_options
def verify(
    output: Path,
    *,
    rows: int | None,
    sample_seed: int | None,
    model: str | None,
    local_workers: int | None,
    mixed: bool,
    as_json: bool,
    queue: str,
    timeout: float | None,
    redis_url: str | None,
) -> int:
    """Make rows of a bulk run's OUTPUT again, and report any that differ.

    With what the run was made with, on workers of the kind that made each row. Ends with 0 if all
    are the same, with 3 if some differ or could not be made again.
    """
    run = written_run(output)
    if run.found is None:
        note(
            f"{run.manifest.input.path} is not there as it was: rows are made again from the "
            "prompts in the output; one that had sampling fields of its own will differ"
        )
    num_written = run.manifest.rows_done - run.manifest.rows_failed
    records: Iterable[WrittenRecord] = run.records()
    num_records = num_written
    if rows is not None:
        records = sample_of(records, rows, sample_seed)
        num_records = len(records)
    verification = Verification(records, mixed=mixed)
    with (
        connected(redis_url) as client,
        Serving(client, queue, model or run.plan.model, num_local=local_workers) as serving,
        signals_kept() as stop,
    ):
        ending = _check(verification, client, serving, queue, stop, num_records, timeout)
    record = _record(run, verification.findings)
    _show(record, verification.findings, as_json=as_json)
    return _exit_code(ending, verification.findings, stop.signum)


def _check(
    verification: Verification,
    client: Client,
    serving: Serving,
    queue: str,
    stop: StopRequest,
    num_records: int,
    timeout_s: float | None,
) -> Ending:
    def on_turn() -> None:
        serving.watch()
        serving.require_kind(
            verification.fingerprint,
            "these rows are",
            "--mixed lets any worker make them again, to see whether kinds differ",
        )

    return verification.run(
        client,
        queue,
        num_records=num_records,
        stop=stop,
        on_turn=on_turn,
        model=serving.requested_model(),
        workers=lambda: Workers(serving.num_slots),
        timeout_s=timeout_s,
    )


def _record(run: WrittenRun, findings: Findings) -> dict[str, Any]:
    return {
        "output": str(run.plan.output),
        "rows": run.manifest.rows_done,
        "checked": findings.checked,
        "differing": findings.differing,
        "failed": findings.failed,
        "file_is_as_written": run.is_as_written(),
        "from_input": run.found is not None,
        "model": run.manifest.model,
        "fingerprint": run.manifest.fingerprint,
        "rows_sha256": run.manifest.rows_sha256,
        "differences": [asdict(one) for one in findings.differences],
        "errors": dict(findings.errors),
    }


def _show(record: dict[str, Any], findings: Findings, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(record, ensure_ascii=False))
        return
    if findings.differences:
        console = output_console()
        columns = ("row", "id", "first differing", "written", "made again")
        table = plain_table("Differences", *columns, console=console)
        for one in findings.differences:
            at = "" if one.at is None else f" {one.at}"
            row = str(one.index) if one.sample == 0 else f"{one.index}, sample {one.sample}"
            table.add_row(row, one.id, f"{one.what}{at}", repr(one.written), repr(one.made))
        console.print(table)
    for message, count in findings.errors.most_common(3):
        note(f"{count} rows could not be made again: {message}")
    if not record["file_is_as_written"]:
        note(f"{record['output']} has been changed since it was written: its digest is another")
    same = findings.checked - findings.differing
    click.echo(
        f"{findings.checked:,} of {record['rows']:,} rows were made again: {same:,} are the same, "
        f"{findings.differing:,} differ"
    )


def _exit_code(ending: Ending, findings: Findings, signum: int | None) -> int:
    match ending:
        case "interrupted":
            return EXIT_SIGNAL_BASE + (signum or 0)
        case "timed out":
            note("the time is up before all rows were made again")
            return EXIT_TIMEOUT
        case "complete":
            return EXIT_SOME_FAILED if findings.differing or findings.failed else EXIT_DONE
