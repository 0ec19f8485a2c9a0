"""Settings as options of a command line, made from their own descriptions."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from shoal_worker.settings import EngineSettings, default_text, flag, variable

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def setting_options(kind: type[EngineSettings], without: Collection[str] = ()) -> Decorator:
    """Give a command one option for each setting, with its description and variable.

    Args:
        kind: whose settings.
        without: names of those that the command decides itself.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for name, info in reversed(kind.model_fields.items()):
            if name not in without:
                command = _option(name, info)(command)
        return command

    return decorate


def _option(name: str, info: FieldInfo) -> Decorator:
    return click.option(
        *_declarations(name, info),
        name,
        type=_option_type(info),
        default=None,
        envvar=None if name == "redis" else variable(name),
        metavar=_metavar(info),
        help=f"{info.description} [default: {default_text(info)}]",
    )


def _declarations(name: str, info: FieldInfo) -> tuple[str, ...]:
    if info.annotation is bool:
        return (f"{flag(name)}/--no-{flag(name)[2:]}",)
    return (flag(name),)


def _option_type(info: FieldInfo) -> Any:
    kinds = get_args(info.annotation) if get_origin(info.annotation) is not Literal else ()
    for kind in (info.annotation, *kinds):
        if get_origin(kind) is Literal:
            return click.Choice(list(get_args(kind)))
        if kind in (int, float, bool):
            return kind
    return str


def _metavar(info: FieldInfo) -> str | None:
    return None if isinstance(_option_type(info), click.Choice) else "VALUE"
