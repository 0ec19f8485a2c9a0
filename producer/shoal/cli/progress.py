"""How a bulk run looks while it goes: a bar on a terminal, else a line a minute."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
)
from rich.progress import Progress as ProgressBar

from shoal.bulk.run_state import RunState
from shoal.cli.exits import note
from shoal.cli.show import duration, share

LOG_INTERVAL_S = 60.0


class Display(Protocol):
    """Shows a run's progress. A context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...

    def show(self, state: RunState) -> None:
        """Show how far it has come."""
        ...


def display_for(console: Console) -> Display:
    """A bar on a terminal, else a line now and then."""
    return BarDisplay(console) if console.is_terminal else LineDisplay()


class BarDisplay:
    """A progress bar: rows, speed, padding, workers, failures, time left."""

    def __init__(self, console: Console) -> None:
        self._bar = ProgressBar(
            SpinnerColumn(),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("rows · {task.fields[facts]}"),
            console=console,
        )
        self._row = self._bar.add_task("", total=None, facts="")

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

    def show(self, state: RunState) -> None:
        """Move the bar."""
        self._bar.update(
            self._row,
            total=state.rows_total,
            completed=state.rows_done,
            facts=" · ".join(facts(state)),
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

    def show(self, state: RunState) -> None:
        """Say how far it has come, if it was not said for a minute."""
        if time.monotonic() - self._shown_s < LOG_INTERVAL_S:
            return
        self._shown_s = time.monotonic()
        rows = f"{state.rows_done} of {state.rows_total} rows"
        note(", ".join([rows, *facts(state)]))


def facts(state: RunState) -> list[str]:
    """Everything but the rows, each in a few words; failures and the limit only where there are."""
    workers = f"{state.workers} worker{'' if state.workers == 1 else 's'}"
    told = [
        f"{state.tokens_per_s:,.0f} tokens/s (mean {state.mean_tokens_per_s:,.0f})",
        f"padding {share(state.padding_ratio)}",
        workers,
    ]
    if state.rows_failed:
        told.append(f"{state.rows_failed} failed")
    if state.limit_ratio:
        told.append(f"{state.limit_ratio:.0%} ended by max_tokens")
    return [*told, f"{duration(state.eta_s)} left"]
