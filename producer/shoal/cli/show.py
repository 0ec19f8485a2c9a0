"""How things look: consoles, and completions as a person reads them.

On a terminal with colours; elsewhere as plain text, so that a pipe gets what was written.
"""

from __future__ import annotations

import json
import sys

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from shoal.wire import GenerationResult

PROMPT_STYLE = "dim"
COMPLETION_STYLE = "bold"
PLAIN_WIDTH = 200
MISSING = "–"


def output_console() -> Console:
    """A console on stdout; as wide as tables need where there is no terminal to fit."""
    return _console(is_error=False)


def error_console() -> Console:
    """A console on stderr."""
    return _console(is_error=True)


def _console(*, is_error: bool) -> Console:
    stream = sys.stderr if is_error else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def print_json(result: GenerationResult) -> None:
    """One result as one line of JSON."""
    click.echo(json.dumps(result.model_dump(mode="json"), ensure_ascii=False))


def print_result(result: GenerationResult, console: Console) -> None:
    """Prompt and completions: each completion after the prompt, numbered if there are several."""
    prompt = result.prompt if isinstance(result.prompt, str) else ""
    for completion in result.completions:
        text = Text()
        if len(result.completions) > 1:
            text.append(f"[{completion.index}] ", style="cyan")
        text.append(prompt, style=PROMPT_STYLE)
        text.append(completion.text, style=COMPLETION_STYLE)
        print_text(text, console)


def print_text(text: Text, console: Console) -> None:
    """One text, never wrapped by us; without a terminal exactly its characters."""
    if console.is_terminal:
        console.print(text, soft_wrap=True)
    else:
        click.echo(text.plain, file=console.file)


def plain_table(title: str, *columns: str, console: Console) -> Table:
    """A table with lines on a terminal, and with columns alone elsewhere."""
    table = Table(title=title, title_justify="left", title_style="bold", header_style="cyan")
    if not console.is_terminal:
        table.box = None
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def duration(seconds: float | None) -> str:
    """A time span in two units at the most."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"


def share(ratio: float | None) -> str:
    """A ratio in per cent."""
    return MISSING if ratio is None else f"{ratio:.1%}"
