"""Which commands there are, and the edge where every error becomes a line and an exit code.

A command's module is loaded when the command runs, or when `--help` lists it: `shoal status` must
not wait for what `shoal worker` imports.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import EntryPoint, entry_points, version
from typing import Any

import click

from shoal.cli.exits import Interrupted, complain, exit_code, signals_raise
from shoal.cli.invocation import Invocation, remember_debug
from shoal.errors import ShoalError

ENTRY_POINTS = "shoal.commands"
OWN_PACKAGES = ("shoal", "shoal_worker")
EXTRAS = {"exporter": "exporter"}  # Commands that are not in the extra `worker`.

COMMANDS = {
    "submit": "shoal.cli.submit:submit",
    "result": "shoal.cli.submit:result",
    "cancel": "shoal.cli.submit:cancel",
    "status": "shoal.cli.status:status",
    "bulk": "shoal.cli.bulk:bulk",
    "exporter": "shoal.cli.exporter:exporter",
    "verify": "shoal.cli.verify:verify",
}


class LazyGroup(click.Group):
    """A group whose commands are loaded by name when asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Shoal's own commands first, then those of installed extras."""
        own = [*COMMANDS, *super().list_commands(ctx)]
        return [*own, *sorted({point.name for point in _entry_points()} - set(own))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of this name, loaded now."""
        if cmd_name in COMMANDS:
            return _loaded(EntryPoint(cmd_name, COMMANDS[cmd_name], ENTRY_POINTS))
        for point in _entry_points():
            if point.name == cmd_name:
                return _loaded(point)
        return super().get_command(ctx, cmd_name)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,  # noqa: ARG002, FBT001, FBT002 - click's signature
        windows_expand_args: bool = True,  # noqa: FBT001, FBT002
        **extra: Any,
    ) -> Any:
        """As click's, with one line and Shoal's exit code for every error."""
        invocation = Invocation()
        extra = {"obj": invocation} | extra
        try:
            with signals_raise():
                code = super().main(
                    args,
                    prog_name,
                    complete_var,
                    standalone_mode=False,
                    windows_expand_args=windows_expand_args,
                    **extra,
                )
        except (Exception, Interrupted) as error:  # noqa: BLE001 - the process's edge
            if invocation.debug:
                traceback.print_exception(error)
            complain(error, invocation)
            code = exit_code(error)
        sys.exit(code if isinstance(code, int) else 0)


def _entry_points() -> list[EntryPoint]:
    return list(entry_points(group=ENTRY_POINTS))


def _loaded(point: EntryPoint) -> click.Command:
    try:
        command: click.Command = point.load()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in OWN_PACKAGES:
            raise
        return _unavailable(point.name, missing)
    return command


def _unavailable(name: str, missing: str) -> click.Command:
    extra = EXTRAS.get(name, "worker")
    install = f'pip install "shoal[{extra}]"'

    def complain_of_extra() -> None:
        raise ShoalError(f"`shoal {name}` needs {missing}, which is not installed: {install}")

    return click.Command(
        name,
        callback=complain_of_extra,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
        add_help_option=False,
        short_help=f"Not installed: {install}",
    )


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(version("shoal"), message="shoal %(version)s")
@click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=remember_debug,
    help="Show where an error arose.",
)
@click.pass_context
def shoal(ctx: click.Context) -> None:
    """Batched, asynchronous text generation: prompts into a queue, completions out."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())
