"""A picture of the overview, drawn from what a Prometheus holds: no screenshot of Grafana.

`python -m ops.grafana.preview URL [--minutes 4] [--rate 15s]`, say against `make watch`. Panels,
places, units and thresholds are the committed dashboard's; only the drawing is matplotlib's.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MultipleLocator
from ops.grafana.queries import DASHBOARDS, Series, ask, filled_in
from PIL import Image

PICTURE = Path(__file__).resolve().parent / "preview.png"
STEPS = 240
COLUMNS, COLUMN_IN, ROW_IN = 24, 0.50, 0.29
TABLE_ROWS = 4  # Of the last panel; it has room for many workers.
PALETTE = ("#73bf69", "#f2cc0c", "#5794f2", "#ff9830", "#f2495c", "#b877d9", "#8ab8ff", "#ffa6b0")
COLOURS = {"green": "#73bf69", "yellow": "#f2cc0c", "red": "#f2495c", "blue": "#5794f2"}
BACKGROUND, SURFACE, TEXT, FAINT = "#111217", "#1a1c22", "#d5d7dd", "#8b8e98"

Answers = list[tuple[dict[str, Any], list[Series]]]


def main() -> None:
    """Ask, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url", help="of the Prometheus")
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--rate", default="15s", help="what stands for $__rate_interval")
    parser.add_argument("--of", required=True, help="a few words on the run, for the title")
    options = parser.parse_args()
    path = DASHBOARDS / "shoal-overview.json"
    dashboard = json.loads(path.read_text(encoding="utf-8"))
    end_s = time.time()
    start_s = end_s - 60 * options.minutes

    def answers(panel: dict[str, Any]) -> Answers:
        return [
            (
                target,
                ask(
                    options.url,
                    filled_in(target["expr"], options.rate),
                    start_s=start_s,
                    end_s=end_s,
                    step_s=(end_s - start_s) / STEPS,
                ),
            )
            for target in panel["targets"]
        ]

    draw(dashboard, answers, options.of)


def draw(dashboard: dict[str, Any], answers: Callable[[dict[str, Any]], Answers], of: str) -> None:
    """The dashboard's panels in their places."""
    mpl.rcParams.update(
        {
            "font.size": 7.5,
            "axes.facecolor": SURFACE,
            "figure.facecolor": BACKGROUND,
            "text.color": TEXT,
            "axes.labelcolor": FAINT,
            "xtick.color": FAINT,
            "ytick.color": FAINT,
            "axes.edgecolor": "#2c2f37",
            "grid.color": "#2c2f37",
        }
    )
    last = max((panel["gridPos"] for panel in dashboard["panels"]), key=lambda place: place["y"])
    last["h"] = TABLE_ROWS
    rows = last["y"] + last["h"] + 2
    figure = plt.figure(figsize=(COLUMNS * COLUMN_IN, rows * ROW_IN))
    figure.text(0.01, 1 - 0.55 / rows, dashboard["title"], size=14, weight="bold", va="center")
    label = f"drawn with matplotlib from Prometheus's data of a real run, no Grafana: {of}"
    figure.text(0.99, 1 - 0.55 / rows, label, size=9, color=FAINT, ha="right", va="center")
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        top = 1 - (place["y"] + 1.3) / rows
        if panel["type"] == "row":
            figure.text(0.01, top - 0.5 / rows, panel["title"], size=10, weight="bold", va="center")
            continue
        left, width = place["x"] / COLUMNS, place["w"] / COLUMNS
        height = place["h"] / rows
        box = (left + 0.004, top - height + 0.25 / rows, width - 0.008, height - 0.35 / rows)
        figure.add_artist(
            Rectangle(box[:2], *box[2:], facecolor=SURFACE, edgecolor="#25272e", zorder=-1)
        )
        title = (left + 0.010, top - 0.62 / rows)
        figure.text(*title, panel["title"], size=8.5, color=TEXT, va="center")
        inner = (box[0] + 0.042, box[1] + 2.1 / rows, box[2] - 0.052, box[3] - 3.2 / rows)
        axes = figure.add_axes(box if panel["type"] in ("stat", "table") else inner)
        _PANELS[panel["type"]](axes, panel, answers(panel))
    figure.savefig(PICTURE, dpi=96)
    # Flat colours: a palette loses nothing that is seen, and half of the bytes.
    palette = Image.open(PICTURE).convert("RGB").quantize(256, method=Image.Quantize.FASTOCTREE)
    palette.save(PICTURE, optimize=True)
    print(f"{PICTURE}: {PICTURE.stat().st_size // 1024} KiB")


def _stat(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    axes.set_axis_off()
    defaults = panel["fieldConfig"]["defaults"]
    series = answers[0][1]
    value = series[0].values[-1] if series else math.nan
    color = COLOURS["blue"]
    for step in defaults["thresholds"]["steps"]:
        if step["value"] is None or value >= step["value"]:
            color = COLOURS[step["color"]]
    text = readable(value, defaults["unit"])
    axes.text(0.5, 0.45, text, size=19, color=color, ha="center", va="center", weight="bold")
    if series:
        course = axes.inset_axes((0.0, 0.0, 1.0, 0.32))
        course.set_axis_off()
        course.fill_between(series[0].times_s, series[0].values, color=color, alpha=0.25, lw=0)
        course.set_ylim(0, 1.1 * max(series[0].values) or 1)


def _timeseries(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    custom = defaults.get("custom", {})
    lines = [
        (_legend(target["legendFormat"], series.labels), series)
        for target, found in answers
        for series in found
    ]
    if custom.get("stacking", {}).get("mode") == "normal" and lines:
        _stack(axes, lines)
    else:
        for i, (name, series) in enumerate(lines):
            color = PALETTE[i % len(PALETTE)]
            if custom.get("drawStyle") == "bars":
                axes.fill_between(
                    series.times_s, series.values, step="mid", color=color, alpha=0.6, label=name
                )
            else:
                axes.plot(series.times_s, series.values, color=color, lw=1, label=name)
    _over_time(axes, defaults["unit"])
    axes.set_ylim(0, defaults.get("max"))
    for step in defaults.get("thresholds", {}).get("steps", ()):
        if step["value"] is not None and step["value"] < axes.get_ylim()[1]:
            axes.axhline(step["value"], color=COLOURS[step["color"]], lw=0.8, ls="--")
    if lines:
        axes.legend(
            *(axes.get_legend_handles_labels()),
            loc="upper center",
            bbox_to_anchor=(0.5, -0.13),
            ncols=min(len(lines), 4 if panel["gridPos"]["w"] >= 8 else 3),
            columnspacing=1,
            frameon=False,
            fontsize=6.5,
            labelcolor=FAINT,
            handlelength=1,
        )


def _stack(axes: Axes, lines: list[tuple[str, Series]]) -> None:
    times_s = sorted({time_s for _, series in lines for time_s in series.times_s})
    filled = [
        np.interp(times_s, series.times_s, series.values, left=0, right=0) for _, series in lines
    ]
    names = [name for name, _ in lines]
    colors = [PALETTE[i % len(PALETTE)] for i in range(len(lines))]
    axes.stackplot(times_s, filled, labels=names, colors=colors, alpha=0.55)


def _heatmap(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    found = sorted(answers[0][1], key=lambda series: float(series.labels["le"]))
    if not found:
        return
    times_s = np.array(max((series.times_s for series in found), key=len))
    cumulated = np.array([np.interp(times_s, one.times_s, one.values) for one in found])
    each = np.diff(cumulated, axis=0, prepend=0)
    used = np.flatnonzero(each.sum(axis=1) > 0)
    first, last = max(0, used[0] - 1), min(len(found) - 1, used[-1] + 1)
    shown = np.ma.masked_less_equal(each[first : last + 1], 1e-9)
    rows = np.arange(last - first + 1)
    axes.pcolormesh(times_s, rows, shown, cmap="Oranges_r", shading="nearest")
    unit = panel["fieldConfig"]["defaults"]["unit"]
    names = [readable(float(one.labels["le"]), unit) for one in found]
    shown_names = [f"≤ {name}" for name in names[first : last + 1]]
    every = 1 + len(rows) // 8
    axes.set_yticks(rows[::every], shown_names[::every])
    _over_time(axes, None)


def _states(axes: Axes, _panel: dict[str, Any], answers: Answers) -> None:
    for i, (target, found) in enumerate(answers):
        for series in found:
            colors = [COLOURS["green" if value else "red"] for value in series.values]
            moments = series.times_s
            axes.scatter(moments, [-i] * len(moments), c=colors, marker="s", s=42, lw=0)
        axes.text(
            0.01, -i + 0.42, target["legendFormat"], transform=axes.get_yaxis_transform(), size=6.5
        )
    axes.set_ylim(-len(answers) + 0.3, 0.85)
    axes.set_yticks([])
    _over_time(axes, None)


def _table(axes: Axes, panel: dict[str, Any], answers: Answers) -> None:
    axes.set_axis_off()
    names = panel["transformations"][1]["options"]["renameByName"]
    facts = ("instance", "model_name", "version", "device", "dtype", "fingerprint")
    columns = [*facts, *list(names.values())[1:]]
    values = [
        {series.labels["instance"]: series.values[-1] for series in found}
        for _, found in answers[1:]
    ]
    cells = [
        [
            *(series.labels[fact] for fact in facts),
            *(readable(one.get(series.labels["instance"], math.nan), "short") for one in values),
        ]
        for series in answers[0][1]
    ]
    for y, line in enumerate([columns, *cells]):
        for x, cell in enumerate(line):
            color = FAINT if y == 0 else TEXT
            axes.text(0.008 + x / len(columns), 0.50 - 0.26 * y, cell[:14], size=7.5, color=color)


_PANELS = {
    "stat": _stat,
    "timeseries": _timeseries,
    "heatmap": _heatmap,
    "state-timeline": _states,
    "table": _table,
}


def _over_time(axes: Axes, unit: str | None) -> None:
    axes.margins(x=0)
    axes.xaxis.set_major_locator(MultipleLocator(60))
    axes.xaxis.set_major_formatter(lambda at_s, _: time.strftime("%H:%M", time.gmtime(at_s)))
    axes.grid(lw=0.5, alpha=0.7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(length=0)
    if unit is not None:
        axes.yaxis.set_major_formatter(lambda value, _: readable(value, unit))


def _legend(form: str, labels: dict[str, str]) -> str:
    for label, value in labels.items():
        form = form.replace(f"{{{{{label}}}}}", value)
    return form


def readable(value: float, unit: str) -> str:
    """A value with its unit, as short as Grafana writes it."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    match unit:
        case "percentunit":
            return f"{100 * value:.3g}%"
        case "bytes":
            return _scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
        case "s" if value >= 120:
            return f"{value / 60:.3g} min"
        case "s" if 0 < value < 1:
            return f"{1000 * value:.3g} ms"
        case "s":
            return f"{value:.3g} s"
        case _:
            return _scaled(value, 1000, ("", "K", "M", "G", "T"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while abs(value) >= base and power < len(units) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {units[power]}".strip()


if __name__ == "__main__":
    main()
