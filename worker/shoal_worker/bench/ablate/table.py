"""The ledger in the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from shoal_worker.bench.ablate.cells import Cells, cells_of, rung_cells
from shoal_worker.bench.ablate.ledger import Header, Ledger, Row

_WIDTH = 170
_STYLES = {
    "faster": "green",
    "slower": "red",
    "no effect": "dim",
    "within the control's noise": "dim",
}


def show(ledger: Ledger, console: Console) -> None:
    """Print it, as wide as it needs to be where no terminal sets a limit."""
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(header_text(ledger.header), style="dim", highlight=False)
    if ledger.rows:
        console.print(_switches(ledger))
        console.print(_claims(ledger.rows))
    if ledger.waterfall:
        console.print(_waterfall(ledger))
    for title, reason in ledger.not_here.items():
        console.print(f"not measured here: {title} ({reason})", style="dim", highlight=False)


def header_text(header: Header) -> str:
    """Where and of what, in a few lines."""
    threads = f", {header.threads} threads" if header.threads else ""
    versions = ", ".join(f"{name} {number}" for name, number in header.versions.items())
    return (
        f"{header.hardware} ({header.device}{threads}); {versions}\n"
        f"{header.model}, {header.dtype}; {header.load}"
    )


def _switches(ledger: Ledger) -> Table:
    table = Table(title="On against off, all else at default", title_justify="left")
    for name, options in Cells.columns():
        table.add_column(name, **options)
    for row in ledger.rows:
        cells = cells_of(row, ledger)
        table.add_row(*cells.texts(), style=_STYLES.get(cells.verdict.partition(",")[0]))
    return table


def _claims(rows: list[Row]) -> Table:
    table = Table(title="What write-ups claim", title_justify="left")
    for name in ("optimisation", "claimed", "measured", "verdict"):
        table.add_column(name)
    for row in rows:
        for claim in row.claims:
            table.add_row(row.title, claim.text, claim.measured, claim.verdict)
    return table


def _waterfall(ledger: Ledger) -> Table:
    table = Table(title="From the naive loop to the default", title_justify="left")
    for name in ("", "tokens/s", "× the rung before", "share of the default"):
        table.add_column(name, justify="left" if not name else "right")
    for cells in rung_cells(ledger.waterfall):
        table.add_row(*cells)
    return table
