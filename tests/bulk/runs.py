"""Whole runs without a queue: rows answered on the spot, written as a run writes them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shoal.bulk.folder import RunFolder
from shoal.bulk.manifest import Manifest
from shoal.bulk.opening import Opened, open_run
from shoal.bulk.plan import Plan
from shoal.bulk.rows import FailedRow, InputRow
from shoal.bulk.writer import OrderedWriter, Outcome
from shoal.wire import Completion, GenerationResult, ResultError, Usage


def answer(row: InputRow) -> Outcome:
    """What is said to a row: it follows from the row alone; FAIL in a prompt fails."""
    request = row.request
    if "FAIL" in str(request.prompt):
        error = ResultError(code="engine_error", message="as it was told to")
        return FailedRow(row.place, row.id, row.source, error)
    completions = [
        Completion(
            index=sample,
            text=f" é{row.place.index}.{sample}",
            token_ids=[sample, row.place.index],
            finish_reason="length",
        )
        for sample in range(request.sampling.n)
    ]
    usage = Usage(prompt_tokens=3, completion_tokens=2 * request.sampling.n)
    return row, GenerationResult(
        id=row.id, completions=completions, usage=usage, model="m", fingerprint="f"
    )


@contextmanager
def writing(plan: Plan) -> Iterator[tuple[Opened, OrderedWriter, Manifest]]:
    """A run, opened and locked, and its writer; its manifest is saved with each sync."""
    folder = RunFolder(plan.output)
    with folder.locked():
        opened = open_run(plan)
        manifest = opened.manifest

        def save(*, complete: bool = False) -> None:
            manifest.rows_done = opened.written.rows
            manifest.rows_sha256 = opened.written.sha256.hexdigest()
            manifest.output_bytes = opened.output.size()
            manifest.complete = complete
            manifest.save(folder.manifest)

        writer = OrderedWriter(
            opened.output, opened.line_format, folder.errors, opened.written, save
        )
        with writer:
            save()
            yield opened, writer, manifest
        if manifest.rows_done == opened.rows_total:
            save(complete=True)


def write_run(
    plan: Plan, *, sync_every: int = 2, after_sync: Callable[[int], None] = lambda _rows: None
) -> Manifest:
    """Write the rows that are left, durable every so many rows."""
    with writing(plan) as (opened, writer, manifest):
        start = opened.written.positions
        for number, row in enumerate(opened.rows):
            writer.put(start + number, row if isinstance(row, FailedRow) else answer(row))
            if number % sync_every == sync_every - 1:
                writer.sync()
                after_sync(opened.written.rows)
        writer.finish()
    return manifest


def write_records(path: Path, records: list[Any]) -> Path:
    """Records as JSON lines; a text is a line as it stands."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in records]
    path.write_text("".join(text + "\n" for text in texts))
    return path
