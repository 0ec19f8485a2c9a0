"""Lines and figures that all reports share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console

from shoal.cli.exits import note
from shoal.cli.show import error_console
from shoal_worker.bench.repeats import Repeats


def print_origin(command: str, host: Mapping[str, str], console: Console) -> None:
    """What was run, where and with what."""
    console.print(f"$ {command}", style="bold", soft_wrap=True)
    facts = dict(host)
    hardware = [facts.pop("hardware"), facts.pop("threads", None), facts.pop("system")]
    console.print(", ".join(fact for fact in hardware if fact), soft_wrap=True)
    date = facts.pop("date")
    versions = ", ".join(f"{name} {number}" for name, number in facts.items())
    console.print(f"{versions}; {date}", soft_wrap=True)


def rate(per_s: float) -> str:
    """Tokens a second, with as many digits as mean something."""
    return f"{per_s:,.0f}" if per_s >= 100 else f"{per_s:.1f}"


def spread(repeats: Repeats) -> str:
    """The lowest and the highest of several."""
    if len(repeats.values) == 1:
        return "1 run"
    return f"{rate(repeats.lowest)}–{rate(repeats.highest)} in {len(repeats.values)}"


@contextmanager
def telling() -> Iterator[Callable[[str], None]]:
    """Says on stderr what happens: in one line that changes, or in a line each for a log."""
    console = error_console()
    if not console.is_terminal:
        yield note
        return
    with console.status("") as status:
        yield status.update
