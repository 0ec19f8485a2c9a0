"""Options that say how a bulk run's input is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self, TypeVar

import click

from shoal.bulk.fields import Fields
from shoal.bulk.plan import OnLongRow

Decorated = TypeVar("Decorated", bound=Callable[..., Any])

_OPTIONS = (
    click.option(
        "--template",
        metavar="TEXT",
        help="The prompt, made from a record's fields: 'Q: {question}'.",
    ),
    click.option(
        "--prompt-column", metavar="C", help="The field that is the prompt. [default: prompt]"
    ),
    click.option("--id-column", metavar="C", help="The field that is the id. [default: id]"),
    click.option(
        "--keep-columns", metavar="A,B", help="Fields that each row of the output repeats."
    ),
    click.option(
        "--on-long",
        type=click.Choice(["error", "truncate-left", "skip"]),
        default="error",
        show_default=True,
        help="What becomes of a prompt that does not fit: an error row, cut at its start, skipped.",
    ),
    click.option("--ignore-model", is_flag=True, help="Take batch lines whatever model they name."),
)


@dataclass(frozen=True, slots=True)
class InputChoices:
    """What these options were given as."""

    fields: Fields
    on_long: OnLongRow
    ignore_model: bool

    @classmethod
    def taken_from(cls, values: dict[str, Any]) -> Self:
        """Their values, which are then no longer among `values`."""
        keep = values.pop("keep_columns") or ""
        fields = Fields(
            values.pop("prompt_column"),
            values.pop("template"),
            values.pop("id_column"),
            tuple(filter(None, (name.strip() for name in keep.split(",")))),
        )
        fields.check()
        return cls(fields, values.pop("on_long"), values.pop("ignore_model"))


def input_options(command: Decorated) -> Decorated:
    """Add them to a command."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command
