"""Options that measurements share: which model, which workload, how much of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from click.core import ParameterSource

from shoal.cli.invocation import remember_debug
from shoal_worker.bench.shapes import DEFAULT_SHAPE, SHAPES
from shoal_worker.bench.workloads import DEFAULT_MAX_TOKENS, Choice
from shoal_worker.setting_options import setting_options
from shoal_worker.settings import EngineSettings, read_engine_settings

# Measurements always warm up, and give the model no other name.
_DECIDED = ("served_model_name", "warm_up")


def measuring_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The engine's settings, `--shape`, the workload, `--rounds`, `--quick` and `--json`."""
    command = _with_choice(command)
    for option in reversed(
        (
            click.option(
                "--shape",
                type=click.Choice(list(SHAPES)),
                help="A model of this shape with random weights, in place of --model. "
                f"[default: {DEFAULT_SHAPE}]",
            ),
            click.option(
                "--workload",
                default="W1",
                show_default=True,
                metavar="W1|W2|FILE",
                help="W1: prompts of 16 to 128 tokens, 64 new ones each; W2: 8 to 256 new ones; "
                "or your prompts, as `shoal bulk` reads them.",
            ),
            click.option(
                "--prompts",
                type=click.IntRange(1),
                metavar="N",
                help="Prompts of the workload. [default: 256 on a CPU, 4096 on a GPU, a quarter "
                "of it with --quick; all of a FILE]",
            ),
            click.option(
                "--max-tokens",
                type=click.IntRange(1),
                default=DEFAULT_MAX_TOKENS,
                show_default=True,
                metavar="N",
                help="New tokens for each prompt of a FILE that does not say.",
            ),
            click.option(
                "--rounds",
                type=click.IntRange(1),
                metavar="N",
                help="Times that everything runs, in turns. [default: 3, with --quick 1]",
            ),
            click.option("--quick", is_flag=True, help="A first impression: less of everything."),
            click.option("--json", "as_json", is_flag=True, help="Print the report as JSON."),
            click.option(
                "--debug", is_flag=True, expose_value=False, callback=remember_debug, hidden=True
            ),
            setting_options(EngineSettings, without=_DECIDED),
        )
    ):
        command = option(command)
    return command


def _with_choice(command: Callable[..., Any]) -> Callable[..., Any]:
    """Give the command the workload's options as one `Choice`, and the rounds as a number."""

    @wraps(command)
    def run(
        *,
        workload: str,
        prompts: int | None,
        max_tokens: int,
        quick: bool,
        rounds: int | None,
        **others: Any,
    ) -> Any:
        choice = Choice(workload, prompts, max_tokens, quick)
        return command(workload=choice, rounds=rounds or (1 if quick else 3), **others)

    return run


@contextmanager
def served_model(
    settings: Mapping[str, Any], shape: str | None, tell: Callable[[str], None]
) -> Iterator[str]:
    """The model to measure: as given, or one of a shape, written for as long as it is needed."""
    model: str | None = settings["model"]
    source = click.get_current_context().get_parameter_source("model")
    if shape and model and source is ParameterSource.COMMANDLINE:
        raise click.UsageError(f"--shape {shape} is a model by itself: leave --model out")
    if model and not shape:
        yield model
        return
    from shoal_worker.bench.random_models import save_random_model

    shape = shape or DEFAULT_SHAPE
    tell(f"writing {shape} with random weights")
    with TemporaryDirectory(prefix="shoal-") as folder:
        path = Path(folder) / shape
        save_random_model(shape, path)
        yield str(path)


def settings_of(settings: Mapping[str, Any], model: str) -> EngineSettings:
    """The engine's settings from options.

    Raises:
        InvalidRequest: one is out of range.
    """
    return read_engine_settings({**settings, "model": model})
