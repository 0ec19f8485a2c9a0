"""`shoal bench peers`: options in, a table out. Loads torch only when it runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

import click

from shoal.cli.show import output_console
from shoal_worker.bench.options import (
    measuring_options,
    served_model,
    settings_of,
)
from shoal_worker.bench.peers.engines import ENGINES
from shoal_worker.bench.report_lines import telling
from shoal_worker.bench.workloads import Choice
from shoal_worker.setting_options import setting_options
from shoal_worker.settings import EngineSettings

PEERS = [name for name in ENGINES if name != "shoal"]


@click.command()
@measuring_options
@click.option(
    "--peer",
    "peers",
    type=click.Choice(PEERS),
    multiple=True,
    help="Measure this one. Repeatable. [default: all that are installed]",
)
@click.option(
    "--peer-python",
    "pythons",
    metavar="PATH",
    multiple=True,
    help="Another interpreter to look for peers in: their requirements may clash with Shoal's. "
    "Repeatable.",
)
@click.option(
    "--converted",
    metavar="PEER=FOLDER",
    multiple=True,
    help="The model in a peer's own format. Repeatable.",
)
@click.option(
    "--variant",
    "variants",
    metavar="OPTIONS",
    multiple=True,
    help='Shoal once more with these options too, such as "--threads 1". Repeatable.',
)
def peers(
    *,
    workload: Choice,
    rounds: int,
    peers: tuple[str, ...],
    pythons: tuple[str, ...],
    converted: tuple[str, ...],
    variants: tuple[str, ...],
    as_json: bool,
    shape: str | None,
    **settings: Any,
) -> None:
    """Measure Shoal beside other engines, in turns.

    All get the same prompts and must make exactly the tokens asked for, on as many threads, each in
    a process of its own. Loading and a first part of the workload are left out.
    Without --model, the model is GPT-2 small with random weights: speed does not depend on them.
    """
    from shoal_worker.bench.peers.measure import Wanted, measure
    from shoal_worker.bench.peers.table import print_report

    in_formats = dict(map(_converted, converted))
    changed = _variants(settings, variants)
    with telling() as tell, served_model(settings, shape, tell) as model:
        wanted = Wanted(
            workload=workload,
            rounds=rounds,
            peers=peers or None,
            pythons=pythons,
            converted=in_formats,
            variants={title: settings_of(values, model) for title, values in changed.items()},
        )
        report = measure(settings_of(settings, model), wanted, tell)
    if as_json:
        click.echo(json.dumps(report.record()))
    else:
        print_report(report, output_console())


def _converted(text: str) -> tuple[str, str]:
    peer, equals, folder = text.partition("=")
    if peer not in PEERS or not equals:
        raise click.UsageError(
            f"--converted is {text!r}; write PEER=FOLDER with PEER one of {', '.join(PEERS)}"
        )
    return peer, folder


@setting_options(EngineSettings, without=("model",))
def _setting_names(**_values: Any) -> None:
    """Stands for a command whose options are the settings."""


def _variants(settings: dict[str, Any], texts: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The settings of each variant, by its title."""
    return {f"Shoal {text}": {**settings, **_parsed(text)} for text in texts}


def _parsed(text: str) -> dict[str, Any]:
    command = click.command(name="--variant")(_setting_names)
    context = command.make_context("--variant", shlex.split(text))
    return {name: value for name, value in context.params.items() if value is not None}
