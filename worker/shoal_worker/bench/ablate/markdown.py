"""The ledger as Markdown."""

from __future__ import annotations

from shoal_worker.bench.ablate.cells import Cells, cells_of, rung_cells
from shoal_worker.bench.ablate.ledger import Ledger
from shoal_worker.bench.ablate.table import header_text
from shoal_worker.settings import flag


def as_markdown(ledger: Ledger, picture: str | None = None) -> str:
    """All of it.

    Args:
        picture: a file's name to show at the top.
    """
    parts = [f"# What each optimisation does: {ledger.header.hardware}"]
    if picture is not None:
        parts.append(f"![Ratios and waterfall]({picture})")
    parts.append("  \n".join(header_text(ledger.header).splitlines()))
    parts.append("    " + "\n    ".join(ledger.commands))
    if ledger.rows:
        parts += ["## On against off, all else at default", _switches(ledger)]
        parts += ["## What write-ups claim", _claims(ledger), "## The arms", _arms(ledger)]
    if ledger.waterfall:
        heads = ["", "tokens/s", "× the rung before", "share of the default"]
        parts.append("## From the naive loop to the default")
        parts.append(_table(heads, [list(cells) for cells in rung_cells(ledger.waterfall)]))
    if ledger.not_here:
        lines = [f"- {title}: {reason}" for title, reason in ledger.not_here.items()]
        parts += ["## Not measured here", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def _switches(ledger: Ledger) -> str:
    heads = [name for name, _ in Cells.columns()]
    return _table(heads, [cells_of(row, ledger).texts() for row in ledger.rows])


def _claims(ledger: Ledger) -> str:
    claims = [
        [row.title, claim.text, claim.measured, claim.verdict]
        for row in ledger.rows
        for claim in row.claims
    ]
    return _table(["optimisation", "claimed", "measured", "verdict"], claims)


def _arms(ledger: Ledger) -> str:
    arms = [
        [
            f"`{row.name}`",
            row.on_text,
            row.off_text,
            f"`{flag(row.setting)}`" if row.setting else "in the benchmark alone",
            row.evidence,
        ]
        for row in ledger.rows
    ]
    return _table(["`--only`", "on", "off", "setting", "what differs countably"], arms)


def _table(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
