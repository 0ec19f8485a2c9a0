"""How a report of peers looks."""

from __future__ import annotations

from rich.console import Console

from shoal.cli.show import plain_table
from shoal_worker.bench.peers.measure import Report
from shoal_worker.bench.report_lines import print_origin, rate, spread


def print_report(report: Report, console: Console) -> None:
    """Who is how fast, and who was not measured and why."""
    print_origin(report.command, report.host, console)
    console.print(
        f"{report.model}, {report.dtype}; {report.workload}: {report.prompts:,} prompts of "
        f"{report.prompt_tokens:,} tokens, {report.new_tokens:,} new tokens, top-k 50"
    )
    console.print()
    table = plain_table(
        "New tokens a second", *("", "median", "range", "Shoal is", "differs"), console=console
    )
    table.columns[1].justify = table.columns[3].justify = "right"
    for one in report.measured:
        table.add_row(
            f"{one.title} {one.version}",
            rate(one.tokens_per_s.median),
            spread(one.tokens_per_s),
            f"{one.shoal_ratio.median:.2f}×",
            one.differs,
        )
    console.print(table)
    for title, reason in report.failed.items():
        console.print(f"{title} failed: it {reason}", soft_wrap=True)
    for title, install in report.missing.items():
        console.print(f"{title} is not installed: {install}", soft_wrap=True)
