"""`shoal bulk`: the options of a run, its workers, and how its end is told."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from shoal.bulk.folder import check_output
from shoal.bulk.plan import Limits, MaxFailures, Plan, Progress, Workers
from shoal.bulk.readers import check_input
from shoal.bulk.run import BulkRun, Ending
from shoal.bulk.shards import ROWS_PER_SHARD
from shoal.bulk.window import MAX_IN_FLIGHT
from shoal.cli.dry_run import dry_run
from shoal.cli.exits import (
    EXIT_DONE,
    EXIT_SIGNAL_BASE,
    EXIT_SOME_FAILED,
    EXIT_TIMEOUT,
    StopRequest,
    note,
    signals_kept,
)
from shoal.cli.input_options import InputChoices, input_options
from shoal.cli.options import common_options, given_sampling, model_option, sampling_options
from shoal.cli.padding import PaddingCount
from shoal.cli.progress import display_for
from shoal.cli.run_report import RunReport
from shoal.cli.serving import Serving, connected
from shoal.cli.show import error_console, output_console
from shoal.cli.summary import print_examples, print_summary, summary_record
from shoal.client import Client
from shoal.errors import ShoalError
from shoal.wire import MAX_SEED, QUEUE_BULK


@click.command()
@click.argument("source", metavar="INPUT", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="A .jsonl, .jsonl.zst or .parquet file, or a folder of .parquet shards: one flat row a "
    "completion, in input order. Batch lines in a .jsonl are answered in OpenAI's response lines.",
)
@model_option
@click.option(
    "--seed",
    type=click.IntRange(0, MAX_SEED),
    default=0,
    show_default=True,
    help="Row i's seed follows from it and i.",
)
@input_options
@click.option("--return-token-ids", is_flag=True, help="A column of each completion's tokens.")
@click.option(
    "--rows-per-shard",
    type=click.IntRange(1),
    default=ROWS_PER_SHARD,
    show_default=True,
    metavar="N",
    help="Rows of each .parquet file in a folder.",
)
@click.option(
    "--dry-run",
    "is_dry",
    is_flag=True,
    help="Tell rows, tokens, refusals, time and disk, and generate nothing.",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Rows at the most.")
@click.option("--max-failures", metavar="N|P%", help="Stop when more rows have failed.")
@click.option(
    "--local-workers", type=click.IntRange(1, 64), metavar="N", help="Workers to start for it."
)
@click.option("--overwrite", is_flag=True, help="Start anew, whatever the output holds.")
@click.option(
    "--mixed",
    is_flag=True,
    help="Let workers of any kind make rows, which then may differ by fingerprint.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as one JSON object.")
@click.option("--queue", default=QUEUE_BULK, show_default=True, help="Where to submit.")
@click.option(
    "--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds for the run; it resumes."
)
@sampling_options(without=("seed",))
@common_options
def bulk(
    source: Path,
    output: Path,
    *,
    model: str | None,
    seed: int,
    limit: int | None,
    max_failures: str | None,
    local_workers: int | None,
    overwrite: bool,
    mixed: bool,
    as_json: bool,
    queue: str,
    timeout: float | None,
    redis_url: str | None,
    return_token_ids: bool,
    rows_per_shard: int,
    is_dry: bool,
    **others: Any,
) -> int:
    """Generate a whole file: resumable, in order.

    INPUT is a .txt file with a prompt a line, a .jsonl file with `prompt` and perhaps `id`,
    sampling fields and `metadata` in each, OpenAI's batch lines, a .csv or a .parquet file; all but
    the last also as .gz or .zst. `-` is standard input, which is kept beside the output. The same
    command again goes on where it was stopped.
    """
    check_input(source)
    check_output(output, source)
    failures = MaxFailures() if max_failures is None else MaxFailures.parse(max_failures)
    choices = InputChoices.taken_from(others)
    plan = Plan(
        source,
        output,
        given_sampling(others),
        seed,
        limit,
        model,
        overwrite,
        mixed,
        choices.fields,
        choices.on_long,
        choices.ignore_model,
        return_token_ids,
        rows_per_shard,
    )
    if is_dry:
        return dry_run(plan, queue, redis_url, as_json=as_json)
    with BulkRun.locked(plan) as run:
        if not run.has_rows_left:
            return _finish(run, as_json=as_json)
        if run.rows_before:
            note(f"going on after {run.rows_before} of {run.rows_total} rows")
        with (
            connected(redis_url) as client,
            Serving(
                client, queue, run.model, num_local=local_workers, log_folder=run.folder.path
            ) as serving,
            signals_kept() as stop,
        ):
            limits = Limits(MAX_IN_FLIGHT, failures, timeout)
            ending = _generate(run, client, serving, queue, limits, stop)
            padding = serving.padding
    _report(run, padding, as_json=as_json)
    return _exit_code(run, ending, stop.signum)


@contextlib.contextmanager
def _saved_on_error(run: BulkRun) -> Iterator[None]:
    """Add to an error what the person needs to know next."""
    try:
        yield
    except ShoalError as error:
        error.args = (f"{error}; {_done(run)}; the same command goes on from there",)
        raise


def _done(run: BulkRun) -> str:
    return f"{run.rows_saved} of {run.rows_total} rows are written"


def _tell_full_disk(run: BulkRun, told: list[bool]) -> None:
    """Say once that a run waits for room, and once that it goes on."""
    if run.is_disk_full == told[0]:
        return
    told[0] = run.is_disk_full
    if run.is_disk_full:
        note(
            f"the disk of {run.plan.output} is full: waiting until there is room; nothing is lost, "
            f"{_done(run)}"
        )
    else:
        note("there is room again: going on")


def _generate(
    run: BulkRun, client: Client, serving: Serving, queue: str, limits: Limits, stop: StopRequest
) -> Ending:
    model = serving.requested_model()
    told = [False]
    with _saved_on_error(run), display_for(error_console()) as display:
        report = RunReport(run, client, queue, serving, display)

        def on_turn(progress: Progress) -> None:
            _tell_full_disk(run, told)
            serving.watch()
            serving.require_kind(run.fingerprint)
            report(progress)

        def workers() -> Workers:
            return Workers(serving.num_slots, are_own=serving.has_local)

        ending: Ending | None = None
        try:
            ending = run.generate(
                client, queue, limits, stop=stop, on_turn=on_turn, model=model, workers=workers
            )
        finally:
            serving.look_last()
            report.end(ending or "failed")
            _tell_full_disk(run, told)
        return ending


def _finish(run: BulkRun, *, as_json: bool) -> int:
    """The end of a run that has nothing to generate: empty, or complete before it began."""
    was_complete = run.manifest.complete
    run.finish()
    if run.rows_total == 0:
        note(f"{run.plan.source} is empty, and so is {run.plan.output}")
    elif was_complete:
        note(f"{run.plan.output} is already complete: {run.rows_total} rows; --overwrite redoes it")
    if as_json:
        click.echo(json.dumps(summary_record(run, PaddingCount())))
    return _exit_code(run, "complete", None)


def _report(run: BulkRun, padding: PaddingCount, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(summary_record(run, padding)))
        return
    console = output_console()
    print_examples(run, console)
    print_summary(run, padding, console)


def _tell_choices(run: BulkRun) -> None:
    """What came of `--on-long`."""
    if run.num_truncated:
        note(f"{_rows(run.num_truncated)} had prompts too long, which lost their beginning")
    if run.manifest.rows_skipped:
        note(f"{_rows(run.manifest.rows_skipped)} too long and left out, see {run.folder.errors}")


def _rows(number: int) -> str:
    return "1 row" if number == 1 else f"{number} rows"


def _exit_code(run: BulkRun, ending: Ending, signum: int | None) -> int:
    """The exit code, and the one line for an end that is not simply done."""
    progress = run.progress()
    done = _done(run)
    match ending:
        case "interrupted":
            note(f"interrupted: {done}; the same command goes on from there")
            return EXIT_SIGNAL_BASE + (signum or 0)
        case "timed out":
            note(f"the time is up: {done}; the same command goes on from there")
            return EXIT_TIMEOUT
        case "too many failures":
            note(f"stopped: {progress.rows_failed} rows failed, see {run.folder.errors}; {done}")
            return EXIT_SOME_FAILED
        case "complete":
            pass
    _tell_choices(run)
    if len(run.fingerprints) > 1:
        note(f"{len(run.fingerprints)} kinds of workers answered; their rows differ by fingerprint")
    if progress.rows_failed:
        note(
            f"{progress.rows_failed} of {progress.rows_total} rows failed: {run.folder.errors} "
            "says why, and is an input for another run"
        )
        return EXIT_SOME_FAILED
    return EXIT_DONE
