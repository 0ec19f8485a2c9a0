"""What holds for one run of the command line, wherever on it was said: `--debug`, `--log-format`.

Kept beside click's context, since the edge where errors end needs it when the context is gone.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import cast, get_args

import click

from shoal.logs import FORMAT_VARIABLE, LogFormat


def _format_of_environment() -> LogFormat:
    # What is wrong about it is said where the option is read.
    text = os.environ.get(FORMAT_VARIABLE)
    return cast("LogFormat", text) if text in get_args(LogFormat) else "text"


@dataclass(slots=True)
class Invocation:
    """What holds for one run of the command line."""

    debug: bool = False
    log_format: LogFormat = field(default_factory=_format_of_environment)


def current_invocation() -> Invocation:
    """Of the command that runs; the defaults outside of one."""
    ctx = click.get_current_context(silent=True)
    return (ctx and ctx.find_object(Invocation)) or Invocation()


def remember_debug(ctx: click.Context, _parameter: click.Parameter, debug: bool) -> None:  # noqa: FBT001
    """Keep `--debug` where the edge finds it when the context is gone."""
    invocation = ctx.find_object(Invocation)
    if debug and invocation is not None:
        invocation.debug = True


def remember_log_format(
    ctx: click.Context, _parameter: click.Parameter, log_format: LogFormat | None
) -> LogFormat | None:
    """The same for `--log-format`."""
    invocation = ctx.find_object(Invocation)
    if log_format is not None and invocation is not None:
        invocation.log_format = log_format
    return log_format
