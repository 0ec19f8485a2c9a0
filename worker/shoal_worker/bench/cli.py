"""`shoal bench`: measures generation on the user's own hardware.

Owns the list of measurements. Their modules are loaded when one is asked for, and load torch only
when it runs, so that help is there at once.
"""

from __future__ import annotations

from importlib import import_module

import click

COMMANDS = {
    "throughput": "shoal_worker.bench.throughput_command:throughput",
    "peers": "shoal_worker.bench.peers_command:peers",
    "ablate": "shoal_worker.bench.ablate.command:ablate",
}


class _Measurements(click.Group):
    """The measurements, each loaded by name when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of the list above."""
        return [*COMMANDS, *super().list_commands(ctx)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The measurement of this name, loaded now."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@click.group(cls=_Measurements)
def bench() -> None:
    """Measure throughput on this machine."""
