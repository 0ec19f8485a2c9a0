"""`shoal bench ablate`: the command line of the ledger."""

from __future__ import annotations

import datetime as dt
import shlex
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.status import Status

from shoal.errors import InvalidRequest, ShoalError
from shoal_worker.bench.ablate.arms import DEFAULT
from shoal_worker.bench.ablate.ledger import Header, Ledger, Row, RungRow, read_ledger
from shoal_worker.bench.ablate.load import LOADS
from shoal_worker.bench.ablate.markdown import as_markdown
from shoal_worker.bench.ablate.measure import Measurements
from shoal_worker.bench.ablate.processes import Spec, surroundings, write_model
from shoal_worker.bench.ablate.rounds import Say
from shoal_worker.bench.ablate.rungs import rungs
from shoal_worker.bench.ablate.switches import switches
from shoal_worker.bench.ablate.table import show
from shoal_worker.bench.shapes import DEFAULT_SHAPE, SHAPES

WATERFALL = "waterfall"
_NAMES = [*(switch.name for switch in switches("float32")), WATERFALL]


@click.command()
@click.option("--model", help="Folder, hub id or `demo`; a model of random weights if not given.")
@click.option(
    "--shape",
    type=click.Choice(list(SHAPES)),
    default=DEFAULT_SHAPE,
    show_default=True,
    help="Of the random weights.",
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
@click.option("--quick", is_flag=True, help="A small workload: minutes instead of hours.")
@click.option("--only", help=f"These alone, by commas: {', '.join(_NAMES)}.")
@click.option(
    "--ledger",
    "ledger_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Put what is measured into this JSON file, beside what an earlier run put there.",
)
@click.option("--show", "show_only", is_flag=True, help="Measure nothing: show the --ledger.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--markdown", type=click.Path(dir_okay=False, path_type=Path), metavar="PATH")
@click.option("--picture", type=click.Path(dir_okay=False, path_type=Path), metavar="PATH")
def ablate(
    *,
    ledger_path: Path | None,
    show_only: bool,
    as_json: bool,
    markdown: Path | None,
    picture: Path | None,
    **options: Any,
) -> None:
    """Measure what each optimisation does on this machine, on against off.

    Then the waterfall: from a naive loop to the default, one at a time. Each arm runs in a process
    of its own, and pairs are interleaved. With --only and --ledger it can be done in pieces.
    """
    if show_only:
        if ledger_path is None:
            raise click.UsageError("--show needs the --ledger that it is to show")
        ledger = read_ledger(ledger_path)
    else:
        before = read_ledger(ledger_path) if ledger_path and ledger_path.exists() else None
        # Written after every group: what was measured before an interruption is not lost.
        for found in _measured(**options):
            ledger = found if before is None else before.with_rows(found, _NAMES)
            if ledger_path is not None:
                ledger_path.write_text(ledger.model_dump_json(indent=1) + "\n", encoding="utf-8")
    if picture is not None:
        _draw(ledger, picture)
    if markdown is not None:
        shown = picture.name if picture is not None else None
        markdown.write_text(as_markdown(ledger, shown), encoding="utf-8")
    if as_json:
        click.echo(ledger.model_dump_json(indent=1))
    else:
        show(ledger, Console())


def _measured(
    *,
    model: str | None,
    shape: str,
    device: str,
    quick: bool,
    only: str | None,
) -> Iterator[Ledger]:
    """What has been measured so far, again and again, and all of it at last."""
    chosen = _chosen(only)
    with Console(stderr=True).status("starting") as status, ExitStack() as stack:
        say = _saying(status)
        name = stack.enter_context(_model(model, shape, say))
        found = surroundings(device)
        load = LOADS[found["device"], quick]
        spec = Spec(
            model=name,
            # A random model's tokenizer has a word for each token: no text to measure on.
            tokenizer=model or "demo",
            device=device,
            arm=DEFAULT,
            load=load,
            kind="serving",
        )
        with Measurements(spec, say) as measurements:
            facts = measurements.default_facts()
            header = Header(
                **found,
                model=facts["model"] if model else f"{shape} shapes, random weights",
                dtype=facts["dtype"],
                load=load.described(),
                quick=quick,
            )
            command = _command(only, quick=quick, model=model, shape=None if model else shape)
            for rows, climbed, not_here in _all_rows(measurements, header, chosen):
                yield Ledger(
                    header=header,
                    commands=[command],
                    rows=rows,
                    waterfall=climbed,
                    not_here=not_here,
                )


def _all_rows(
    measurements: Measurements, header: Header, chosen: list[str]
) -> Iterator[tuple[list[Row], list[RungRow], dict[str, str]]]:
    """Rows so far, and a waterfall only when it is whole."""
    on_gpu = header.device == "cuda"
    wanted = [switch for switch in switches(header.dtype) if switch.name in chosen]
    here = [switch for switch in wanted if switch.only_on in (None, header.device)]
    not_here = {
        switch.title: f"on {switch.only_on} alone" for switch in wanted if switch not in here
    }
    rows: list[Row] = []
    for row in measurements.rows(here):
        rows = sorted([*rows, row], key=lambda row: _NAMES.index(row.name))
        yield rows, [], not_here
    climbed = rungs(on_gpu=on_gpu, default_dtype=header.dtype) if WATERFALL in chosen else []
    yield rows, list(measurements.rungs(climbed)), not_here


def _saying(status: Status) -> Say:
    """Shows what goes on; a line each, with the time, where no terminal shows it in place."""

    def say(text: str) -> None:
        status.update(text)
        if not status.console.is_terminal:
            click.echo(f"{dt.datetime.now(dt.UTC):%H:%M:%S} {text}", err=True)

    return say


def _chosen(only: str | None) -> list[str]:
    if only is None:
        return _NAMES
    names = [name.strip() for name in only.split(",") if name.strip()]
    unknown = [name for name in names if name not in _NAMES]
    if unknown or not names:
        raise InvalidRequest(
            f"--only {only!r}: {', '.join(unknown) or 'nothing'} is none of {', '.join(_NAMES)}"
        )
    return names


@contextmanager
def _model(model: str | None, shape: str, say: Say) -> Iterator[str]:
    """The model to measure: the one named, or one of random weights for as long as it lasts."""
    if model is not None:
        yield model
        return
    with tempfile.TemporaryDirectory(prefix="shoal-ablate-") as folder:
        say(f"writing {shape}")
        path = Path(folder) / shape
        write_model(shape, str(path))
        yield str(path)


def _command(only: str | None, *, quick: bool, **options: str | None) -> str:
    """What was run and when; not where its output went."""
    given = [word for name, value in options.items() if value for word in (f"--{name}", value)]
    words = [*given, *(["--quick"] if quick else []), *(["--only", only] if only else [])]
    today = dt.datetime.now(dt.UTC).date()
    return f"{today}: shoal bench ablate {shlex.join(words)}".rstrip()


def _draw(ledger: Ledger, path: Path) -> None:
    try:
        # Imported here: pictures are an extra of their own.
        from shoal_worker.bench.ablate.picture import draw
    except ImportError:
        raise ShoalError('--picture needs matplotlib: pip install "shoal[bench]"') from None
    draw(ledger, path)
