"""`shoal bench throughput`: options in, a report out. Loads torch only when it runs."""

from __future__ import annotations

import json
from typing import Any

import click

from shoal.cli.show import output_console
from shoal_worker.bench.options import measuring_options, served_model, settings_of
from shoal_worker.bench.report_lines import telling
from shoal_worker.bench.workloads import Choice


@click.command()
@measuring_options
@click.option(
    "--calls",
    type=click.IntRange(1),
    metavar="N",
    help="Calls that a step's time is the mean of. [default: 20, with --quick 5]",
)
@click.option(
    "--queue/--no-queue", "through_queue", default=True, help="Measure through Redis too."
)
@click.option(
    "--redis", "redis_url", metavar="URL", help="Go through this Redis; else an embedded one."
)
def throughput(
    *,
    workload: Choice,
    rounds: int,
    calls: int | None,
    through_queue: bool,
    redis_url: str | None,
    as_json: bool,
    shape: str | None,
    **settings: Any,
) -> None:
    """Measure tokens a second: the engine alone, and through the queue.

    Both run the same workload in turns. Then a step is taken apart, and everything is put beside
    what the memory's bandwidth and the rate of matrix products allow, measured here and now.
    Without --model, the model is GPT-2 small with random weights: speed does not depend on them.
    """
    from shoal_worker.bench.throughput import Wanted, measure
    from shoal_worker.bench.throughput_table import print_report

    wanted = Wanted(
        workload=workload,
        rounds=rounds,
        calls=calls or (5 if workload.is_quick else 20),
        through_queue=through_queue,
        redis_url=redis_url,
    )
    with telling() as tell, served_model(settings, shape, tell) as model:
        report = measure(settings_of(settings, model), wanted, tell)
    if as_json:
        click.echo(json.dumps(report.record()))
    else:
        print_report(report, output_console())
