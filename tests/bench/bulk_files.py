"""Rows a second and peak memory of a bulk run's files: reading, digesting, writing, no queue.

    python -m tests.bench.bulk_files --rows 1000000 --output out.jsonl

Every row is answered on the spot with 64 tokens of text, so what is measured is the producer's own
work: one pass for the digest, one for the rows, canonical bytes, fsync every 5 s.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from shoal.bulk.folder import RunFolder
from shoal.bulk.opening import open_run
from shoal.bulk.plan import Plan
from shoal.bulk.rows import FailedRow
from shoal.bulk.writer import OrderedWriter
from shoal.wire import Completion, GenerationResult, Usage

COMPLETION = Completion(
    index=0, text=" and so on" * 20, token_ids=list(range(64)), finish_reason="length"
)
RESULT = GenerationResult(
    id="",
    completions=[COMPLETION],
    usage=Usage(prompt_tokens=8, completion_tokens=64),
    model="m",
    fingerprint="f" * 24,
)


def measure(num_rows: int, folder: Path, output: str) -> dict[str, object]:
    """Write a file of prompts, answer it, and go on with it once it is there."""
    source = folder / "in.jsonl"
    with source.open("w") as file:
        for i in range(num_rows):
            file.write(f'{{"prompt": "What is the square root of {i}, and why?"}}\n')
    plan = Plan(source, folder / output)
    found: dict[str, object] = {"rows": num_rows, "output": output}
    for name in ("write", "resume"):
        started_s = time.monotonic()
        _run(plan)
        found[f"{name}_rows_per_s"] = round(num_rows / (time.monotonic() - started_s))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["peak_mb"] = round(peak_bytes / 1e6)
    return found


def _run(plan: Plan) -> None:
    folder = RunFolder(plan.output)
    with folder.locked():
        opened = open_run(plan)
        manifest = opened.manifest

        def save() -> None:
            manifest.save(folder.manifest)

        writer = OrderedWriter(
            opened.output, opened.line_format, folder.errors, opened.written, save
        )
        with writer:
            start = opened.written.positions
            for position, row in enumerate(opened.rows, start):
                writer.put(position, row if isinstance(row, FailedRow) else (row, RESULT))
                writer.sync_if_due(time.monotonic())
            writer.finish()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--output", default="out.jsonl", help="its name says the format")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(options.rows, Path(folder), options.output)))


if __name__ == "__main__":
    main()
