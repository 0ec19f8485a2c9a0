"""How a report of throughput looks."""

from __future__ import annotations

from rich.console import Console

from shoal.cli.show import plain_table, share
from shoal_worker.bench.report_lines import print_origin, rate, spread
from shoal_worker.bench.throughput import ENGINE, Report

MAX_BUCKETS = 5


def print_report(report: Report, console: Console) -> None:
    """Who is how fast, what the steps did, and where a step's time goes."""
    print_origin(report.command, report.host, console)
    console.print(
        f"{report.model}, {report.dtype}, lanes {', '.join(report.lanes)}; "
        f"loaded in {report.load_s:.1f} s, warm after {report.warm_up_s:.1f} s more"
    )
    console.print(
        f"{report.workload}: {report.prompts:,} prompts of {report.prompt_tokens:,} tokens, "
        f"{report.new_tokens:,} new tokens"
    )
    _print_speeds(report, console)
    _print_phases(report, console)
    _print_step(report, console)


def _print_speeds(report: Report, console: Console) -> None:
    console.print()
    table = plain_table("New tokens a second", "", "median", "range", "share", console=console)
    table.columns[1].justify = "right"
    for name, repeats in report.tokens_per_s.items():
        of_what = f"{share(report.roofline_ratio)} of the roofline"
        if name != ENGINE and report.queue_ratio is not None:
            of_what = f"{report.queue_ratio.median:.3f} of the engine alone"
        table.add_row(name, rate(repeats.median), spread(repeats), of_what)
    table.add_row("roofline", rate(report.bound_tokens_per_s), "", "")
    console.print(table)
    ceilings = report.ceilings
    console.print(
        f"measured: {ceilings.bytes_per_s / 1e9:,.1f} GB/s, "
        f"{ceilings.operations_per_s / 1e12:,.2f} TFLOP/s in {report.dtype}"
    )


def _print_phases(report: Report, console: Console) -> None:
    console.print()
    table = plain_table(
        f"Steps of the engine's last run, {report.duration_s:.2f} s",
        *("", "steps", "a step", "share of time", "rows in use", "padding"),
        console=console,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for name, total in report.phases.items():
        table.add_row(
            name,
            f"{total.steps:,}",
            f"{total.step_ms:,.2f} ms",
            share(total.seconds / report.duration_s),
            share(total.rows_ratio),
            share(total.padding_ratio),
        )
    rest = report.duration_s - sum(total.seconds for total in report.phases.values())
    table.add_row("scheduling and text", "", "", share(rest / report.duration_s), "", "")
    console.print(table)


def _print_step(report: Report, console: Console) -> None:
    step, call = report.decode, report.decode.call
    console.print()
    table = plain_table(
        f"A decode step of {step.lane}, all slots in use, {step.context:.0f} positions each",
        *("", "time", "share"),
        console=console,
    )
    table.columns[1].justify = table.columns[2].justify = "right"
    for part, part_ms in call.parts_ms.items():
        table.add_row(part, f"{part_ms / step.steps:.2f} ms", share(part_ms / call.device_ms))
    table.add_row("whole step", f"{step.step_ms:.2f} ms", "")
    table.add_row("roofline", f"{report.step_bound_ms:.2f} ms", share(report.step_roofline_ratio))
    console.print(table)
    shown = _a_few(list(report.prefill_ms.items()))
    times = ", ".join(f"{shape} {ms:,.1f} ms" for shape, ms in shown)
    console.print(f"a full prefill, rows × tokens: {times}")


def _a_few(buckets: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Some from the first to the last: a CPU's lane may have dozens."""
    last = len(buckets) - 1
    places = {round(i * last / (MAX_BUCKETS - 1)) for i in range(MAX_BUCKETS)}
    return [buckets[place] for place in sorted(places)]
