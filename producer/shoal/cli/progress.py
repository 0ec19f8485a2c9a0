"""How a bulk run looks while it goes and when it has ended."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any, Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
)
from rich.progress import Progress as ProgressBar
from rich.text import Text

from shoal.bulk.plan import Progress
from shoal.bulk.run import BulkRun
from shoal.cli.exits import note
from shoal.cli.show import (
    COMPLETION_STYLE,
    PROMPT_STYLE,
    duration,
    plain_table,
    print_text,
    share,
)

LOG_INTERVAL_S = 60.0
MAX_EXAMPLE_CHARS = 240


class Display(Protocol):
    """Shows a run's progress. A context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def show(self, progress: Progress, padding_ratio: float | None) -> None:
        """Show how far it has come."""
        ...


def display_for(console: Console) -> Display:
    """A bar on a terminal, else a line now and then."""
    return BarDisplay(console) if console.is_terminal else LineDisplay()


class BarDisplay:
    """A progress bar: rows, tokens a second, padding, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = ProgressBar(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows · {task.fields[speed]} · padding {task.fields[padding]}"),
            TextColumn("· {task.fields[left]}"),
            console=console,
        )
        self._row = self._bar.add_task("", total=None, speed="", padding="", left="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def show(self, progress: Progress, padding_ratio: float | None) -> None:
        """Move the bar."""
        self._bar.update(
            self._row,
            total=progress.rows_total,
            completed=progress.rows_done,
            speed=f"{progress.tokens_per_s:,.0f} tokens/s",
            padding=share(padding_ratio),
            left=f"{duration(progress.left_s)} left",
        )


class LineDisplay:
    """A line on stderr each minute, for logs."""

    def __init__(self) -> None:
        self._shown_s = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        pass

    def show(self, progress: Progress, padding_ratio: float | None) -> None:
        """Say how far it has come, if it was not said for a minute."""
        if time.monotonic() - self._shown_s < LOG_INTERVAL_S:
            return
        self._shown_s = time.monotonic()
        note(
            f"{progress.rows_done} of {progress.rows_total} rows, {progress.rows_failed} failed, "
            f"{progress.tokens_per_s:,.0f} tokens/s, padding {share(padding_ratio)}, "
            f"{duration(progress.left_s)} left"
        )


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


def print_summary(run: BulkRun, padding_ratio: float | None, console: Console) -> None:
    """What came of a run, as a table."""
    table = plain_table("Bulk run", "", "", console=console)
    table.show_header = False
    table.columns[1].justify = "right"
    record = summary_record(run, padding_ratio)
    progress = run.progress()
    rows = f"{progress.rows_done:,} of {progress.rows_total:,}"
    if progress.rows_before:
        rows += f" ({progress.rows_before:,} from before)"
    table.add_row("rows", rows)
    table.add_row(
        "failed", f"{progress.rows_failed:,}", style="red" if progress.rows_failed else ""
    )
    table.add_row("prompt tokens", f"{progress.prompt_tokens:,}")
    table.add_row("completion tokens", f"{progress.completion_tokens:,}")
    table.add_row("wall time", duration(progress.elapsed_s))
    table.add_row("tokens/s", f"{progress.tokens_per_s:,.1f}")
    table.add_row("padding", share(padding_ratio))
    table.add_row("output", str(record["output"]))
    if progress.rows_failed:
        table.add_row("errors", str(record["errors"]))
    console.print(table)


def summary_record(run: BulkRun, padding_ratio: float | None) -> dict[str, Any]:
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
        "padding_ratio": padding_ratio,
        "model": manifest.model,
        "fingerprint": manifest.fingerprint,
        "rows_sha256": manifest.rows_sha256,
        "file_sha256": manifest.file_sha256,
        "output": str(run.plan.output),
        "errors": str(run.folder.errors) if progress.rows_failed else None,
        "manifest": str(run.folder.manifest),
    }


def _shortened(text: str, *, from_start: bool) -> str:
    text = text.replace("\n", " ⏎ ")
    if len(text) <= MAX_EXAMPLE_CHARS:
        return text
    return f"{text[:MAX_EXAMPLE_CHARS]}…" if from_start else f"…{text[-MAX_EXAMPLE_CHARS:]}"
