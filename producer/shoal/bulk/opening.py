"""What a run finds when it begins: its input, what an earlier run has written of it, its output.

Owns which output and which lines a plan asks for. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from shoal.bulk.card import write_card
from shoal.bulk.folder import RunFolder
from shoal.bulk.line_format import FlatLines, LineFormat, ResponseLines
from shoal.bulk.manifest import InputFile, Manifest, Parameters, load, replaced_run, take_over
from shoal.bulk.output import JsonLines, Output, ZstdLines, output_format
from shoal.bulk.parquet_files import Schema
from shoal.bulk.parquet_output import ParquetFile, ParquetFolder
from shoal.bulk.plan import Plan
from shoal.bulk.readers import Survey, input_format, read_rows, survey
from shoal.bulk.resume import Written, join
from shoal.bulk.rows import Row
from shoal.bulk.shards import Shards
from shoal.bulk.streams import kept_inputs, spool
from shoal.validation import parse
from shoal.wire import SamplingParams


@dataclass(slots=True)
class Opened:
    """A run's beginning.

    Attributes:
        written: what stays of an earlier run; rows: what is left to do.
        replaced: the run whose place this one takes, if that may have jobs in Redis.
    """

    manifest: Manifest
    rows_total: int
    output: Output
    line_format: LineFormat
    written: Written
    rows: Iterator[Row]
    replaced: str | None = None


def open_with_input(plan: Plan) -> tuple[Plan, Opened]:
    """`open_run`, with standard input kept as a file first: the plan then names that.

    What is refused is not kept, and takes nothing's place.
    """
    if str(plan.source) != "-":
        return plan, open_run(plan)
    folder = RunFolder(plan.output).path
    before = kept_inputs(folder)
    plan = replace(plan, source=spool(folder, is_table=not plan.fields.are_default))
    try:
        opened = open_run(plan)
    except BaseException:
        if plan.source not in before:
            plan.source.unlink()
        raise
    for path in before:
        if path != plan.source:
            path.unlink()
    return plan, opened


def open_run(plan: Plan) -> Opened:
    """Read the input once, and what an earlier run has written of it.

    Raises:
        InvalidRequest: the output belongs to another run, or to none.
    """
    plan.fields.check()
    found = survey(plan.source, plan.fields)
    manifest = new_manifest(plan, found)
    rows = read_rows(plan.source, plan.row_defaults(found.kinds), plan.limit)
    total = found.num_rows if plan.limit is None else min(found.num_rows, plan.limit)
    folder = RunFolder(plan.output)
    output, line_format = output_of(plan, found), line_format_of(plan)
    if plan.overwrite or not take_over(folder, manifest, output):
        replaced = replaced_run(folder, manifest, overwrite=plan.overwrite)
        return Opened(manifest, total, output, line_format, Written(), rows, replaced)
    written, rows = join(rows, output, line_format, folder.errors)
    # The manifest is saved after the rows: a killed run may have said it in these alone.
    manifest.fingerprint = manifest.fingerprint or written.fingerprint
    return Opened(manifest, total, output, line_format, written, rows)


def new_manifest(plan: Plan, found: Survey) -> Manifest:
    """The manifest of a run that begins."""
    sampling = parse(SamplingParams, dict(plan.sampling))
    fields = plan.fields
    return Manifest(
        input=InputFile(path=str(plan.source), sha256=found.sha256, rows=found.num_rows),
        parameters=Parameters(
            input_format=input_format(plan.source),
            sampling=sampling.model_dump(mode="json", exclude={"seed"}),
            seed=plan.seed,
            limit=plan.limit,
            model=plan.model,
            template=fields.template,
            prompt_column=fields.prompt,
            id_column=fields.id,
            keep_columns=list(fields.keep),
            on_long=plan.on_long,
            ignore_model=plan.ignore_model,
            return_token_ids=plan.return_token_ids,
            rows_per_shard=plan.rows_per_shard,
        ),
        output=str(plan.output),
    )


def line_format_of(plan: Plan) -> LineFormat:
    """Batch lines are answered in OpenAI's response lines, where the output has lines."""
    has_lines = output_format(plan.output) in {"jsonl", "jsonl.zst"}
    if has_lines and input_format(plan.source) == "openai-batch":
        return ResponseLines(plan.return_token_ids)
    return FlatLines(plan.return_token_ids)


def output_of(plan: Plan, found: Survey) -> Output:
    """The output by its name."""
    path, folder = plan.output, RunFolder(plan.output)
    schema = Schema(found.kinds, with_token_ids=plan.return_token_ids)
    match output_format(path):
        case "jsonl":
            return JsonLines(path)
        case "jsonl.zst":
            return ZstdLines(path)
        case "parquet":
            return ParquetFile(path, Shards(folder.shards, schema, plan.rows_per_shard))
        case "folder":
            card = partial(_write_card, folder)
            return ParquetFolder(path, folder.shards, schema, plan.rows_per_shard, card)


def _write_card(folder: RunFolder, num_rows: int) -> None:
    """From the manifest as it was last saved: when the last row was."""
    manifest = load(folder.manifest)
    assert manifest is not None, "a run saves its manifest before it ends"
    write_card(folder.output, manifest, num_rows)


def stock_of(written: Written, output: Output, *, complete: bool) -> dict[str, Any]:
    """What a manifest says of how far its run has come."""
    return {
        "rows_done": written.rows,
        "rows_failed": written.rows_failed,
        "rows_skipped": written.rows_skipped,
        "completions": written.completions,
        "complete": complete,
        "output_bytes": output.size(),
        "rows_sha256": written.sha256.hexdigest(),
        "file_sha256": output.sha256() if complete else None,
    }
