"""What came of a bulk run, when it has ended: examples, a table, a JSON object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.text import Text

from shoal.bulk.plan import Progress
from shoal.bulk.run import BulkRun
from shoal.cli.padding import PaddingCount
from shoal.cli.show import (
    COMPLETION_STYLE,
    PROMPT_STYLE,
    duration,
    plain_table,
    print_text,
    share,
)

MAX_EXAMPLE_CHARS = 240
HINT_RATIO = 0.5


def print_examples(run: BulkRun, console: Console) -> None:
    """A few of the completions, shortened."""
    console.print()
    for row, result in run.examples:
        prompt = row.request.prompt if isinstance(row.request.prompt, str) else ""
        text = Text()
        text.append(_shortened(prompt, from_start=False), style=PROMPT_STYLE)
        text.append(_shortened(result.text, from_start=True), style=COMPLETION_STYLE)
        print_text(text, console)
        console.print()


def print_summary(run: BulkRun, padding: PaddingCount, console: Console) -> None:
    """What came of a run, as a table."""
    table = plain_table("Bulk run", "", "", "", console=console)
    table.show_header = False
    table.columns[1].justify = "right"
    record, progress = summary_record(run, padding), run.progress()
    from_before = f"{progress.rows_before:,} from before" if progress.rows_before else ""
    table.add_row("rows", f"{progress.rows_done:,} of {progress.rows_total:,}", from_before)
    style = "red" if progress.rows_failed else ""
    table.add_row("failed", f"{progress.rows_failed:,}", str(record["errors"] or ""), style=style)
    table.add_row("prompt tokens", f"{progress.prompt_tokens:,}")
    table.add_row("completion tokens", f"{progress.completion_tokens:,}")
    table.add_row("wall time", duration(progress.elapsed_s))
    table.add_row("tokens/s", f"{progress.tokens_per_s:,.1f}")
    if padding.ratio is not None:
        # A CPU leaves most of it out of its products, so it costs less there.
        lost = f"at most {duration(padding.ratio * progress.elapsed_s)} of the wall time"
        table.add_row("padding", share(padding.ratio), lost)
    hint = limit_hint(progress, run.manifest.parameters.sampling)
    table.add_row("ended by max_tokens", share(progress.limit_ratio), hint)
    table.add_row("output", str(record["output"]))
    console.print(table)


def summary_record(run: BulkRun, padding: PaddingCount) -> dict[str, Any]:
    """What came of a run, as plain JSON values. Tokens and seconds count from this start."""
    progress, manifest = run.progress(), run.manifest
    return {
        "complete": manifest.complete,
        "rows_total": progress.rows_total,
        "rows": progress.rows_done,
        "rows_before": progress.rows_before,
        "failed": progress.rows_failed,
        "prompt_tokens": progress.prompt_tokens,
        "completion_tokens": progress.completion_tokens,
        "wall_s": round(progress.elapsed_s, 3),
        "tokens_per_s": round(progress.tokens_per_s, 3),
        "padding_ratio": padding.ratio,
        "padding_tokens": padding.num_padding,
        "limit_ratio": progress.limit_ratio,
        "jobs_lost": progress.jobs_lost,
        "model": manifest.model,
        "fingerprint": manifest.fingerprint,
        "rows_sha256": manifest.rows_sha256,
        "file_sha256": manifest.file_sha256,
        "output": str(run.plan.output),
        "errors": str(run.folder.errors) if progress.rows_failed else None,
        "manifest": str(run.folder.manifest),
    }


def limit_hint(progress: Progress, sampling: Mapping[str, Any]) -> str | None:
    """What to do if max_tokens ends most completions, unless nothing else could."""
    ratio = progress.limit_ratio
    if ratio is None or ratio <= HINT_RATIO or sampling.get("ignore_eos"):
        return None
    return "a greater --max-tokens lets more of them end by themselves"


def _shortened(text: str, *, from_start: bool) -> str:
    text = text.replace("\n", " ⏎ ")
    if len(text) <= MAX_EXAMPLE_CHARS:
        return text
    return f"{text[:MAX_EXAMPLE_CHARS]}…" if from_start else f"…{text[-MAX_EXAMPLE_CHARS:]}"
