"""The ledger as a picture for a slide: ratios with their intervals, and the waterfall."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from shoal_worker.bench.ablate.ledger import Ledger, Row, RungRow
from shoal_worker.bench.ablate.ratios import steps

_INK, _FAINT, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_FASTER, _SLOWER, _NULL, _CLAIM = "#0b7285", "#c2410c", "#9aa5b1", "#f4b740"
_STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _GRID,
    "axes.labelcolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _INK,
    "svg.fonttype": "none",
}
_ROW_INCHES = 0.34


def draw(ledger: Ledger, path: Path) -> None:
    """Write it; the suffix says as what."""
    panels = [bool(ledger.rows), len(ledger.waterfall) > 1]
    with mpl.rc_context(_STYLE):
        num_rows = max(len(ledger.rows), len(ledger.waterfall), 6)
        figure = Figure(figsize=(8 * max(1, sum(panels)), 1.9 + _ROW_INCHES * num_rows))
        axes = figure.subplots(1, max(1, sum(panels)), squeeze=False)[0]
        places = iter(axes)
        if panels[0]:
            _ratios(next(places), ledger)
        if panels[1]:
            _waterfall(next(places), ledger.waterfall)
        _titles(figure, ledger)
        figure.tight_layout(rect=(0, 0.01, 1, 1 - 0.95 / figure.get_figheight()), w_pad=3)
        figure.savefig(path, dpi=160, facecolor="white")


def _titles(figure: Figure, ledger: Ledger) -> None:
    header = ledger.header
    height = figure.get_figheight()
    figure.text(
        0.012,
        1 - 0.34 / height,
        "What each optimisation really does",
        fontsize=17,
        fontweight="bold",
        va="center",
    )
    threads = f", {header.threads} threads" if header.threads else ""
    figure.text(
        0.012,
        1 - 0.68 / height,
        f"{header.model} in {header.dtype} on {header.hardware}{threads}; "
        f"torch {header.versions['torch']}, transformers {header.versions['transformers']}",
        fontsize=10,
        color=_FAINT,
        va="center",
    )


def _ratios(axes: Any, ledger: Ledger) -> None:
    # The control at the foot: how far two equal arms are apart.
    shown = sorted(ledger.rows, key=lambda row: (row.name != "control", row.gain.ratio))
    for place, row in enumerate(shown):
        gain, is_null = row.gain, not ledger.has_effect(row)
        colour = _NULL if is_null else _FASTER if gain.ratio > 1 else _SLOWER
        for claim in _claimed_ranges(row):
            axes.barh(
                place, claim[1] - claim[0], left=claim[0], height=0.62, color=_CLAIM, alpha=0.5
            )
        axes.plot([gain.low, gain.high], [place, place], color=colour, lw=3, solid_capstyle="round")
        axes.plot(gain.ratio, place, "o", color=colour, ms=7)
        text = "no effect" if is_null else _factor(gain.ratio)
        axes.annotate(
            text,
            (1.01, place),
            xycoords=("axes fraction", "data"),
            va="center",
            color=colour,
            fontweight="normal" if is_null else "bold",
        )
    axes.axvline(1, color=_INK, lw=1)
    axes.set_xscale("log")
    axes.set_yticks(range(len(shown)), [row.title for row in shown])
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.xaxis.set_minor_formatter(FuncFormatter(_minor))
    axes.set_ylim(-0.7, len(shown) - 0.3)
    axes.set_title("On against off, all else at default", loc="left", fontweight="bold")
    axes.set_xlabel("speed with it ÷ without it, 95% interval;  yellow: what write-ups claim")
    _bare(axes, "x")


def _minor(value: float, _: object) -> str:
    """Names of a few places between powers of ten."""
    leading = value / 10 ** _exponent(value)
    return f"{value:g}×" if round(leading, 6) in (2.0, 5.0) else ""


def _exponent(value: float) -> int:
    return int(f"{value:e}".partition("e")[2])


def _claimed_ranges(row: Row) -> list[tuple[float, float]]:
    return [claim.range for claim in row.claims if claim.range is not None]


def _factor(ratio: float) -> str:
    return f"{ratio:.1f}×" if ratio >= 2 else f"{ratio - 1:+.0%}"


def _waterfall(axes: Any, rungs: list[RungRow]) -> None:
    speeds = [rung.tokens_per_s for rung in rungs]
    # By shares of the default, which ran beside each rung: its speed drifts less than the rungs'.
    levels = [rung.of_default * speeds[-1] for rung in rungs]
    factors = steps(levels)
    count = len(rungs)
    for place, (level, factor) in enumerate(zip(levels, factors, strict=True)):
        y = count - 1 - place
        if place in (0, count - 1):
            axes.barh(y, level, height=0.62, color=_FAINT if place == 0 else _INK)
        else:
            before = levels[place - 1]
            colour = _FASTER if level >= before else _SLOWER
            axes.barh(y, level - before, left=before, height=0.62, color=colour)
        text = f"{level:,.1f}" if place == 0 else f"{level:,.1f}   {_factor(factor)}"
        axes.annotate(
            text,
            (max(level, levels[place - 1] if place else 0), y),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    for place, (before, _) in enumerate(pairwise(levels)):
        y = count - 1 - place
        axes.plot([before, before], [y - 1.31, y - 0.31 + 0.62], color=_GRID, lw=1, zorder=0)
    axes.set_yticks(range(count), [rung.title for rung in reversed(rungs)])
    axes.set_xlim(0, max(levels) * 1.35)
    axes.set_ylim(-0.7, count - 0.3)
    axes.set_title("From the naive loop to the default", loc="left", fontweight="bold")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("tokens a second, and the gain over the rung before")
    _bare(axes, "x")


def _bare(axes: Any, grid: str) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.grid(axis=grid, color=_GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
