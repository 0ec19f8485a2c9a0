"""The expressions of the committed dashboards, put to a Prometheus as Grafana would.

Owns what stands for Grafana's variables and what counts as an answer. It knows no Grafana.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).resolve().parent / "dashboards"
EVERYTHING = ".*"
TIMEOUT_S = 10.0


class BadExpressionError(Exception):
    """An expression that Prometheus refuses, and why."""


@dataclass(frozen=True, slots=True)
class PanelQuery:
    """One expression of one panel."""

    dashboard: str
    panel: str
    legend: str
    expr: str

    def __str__(self) -> str:
        return f"{self.dashboard} / {self.panel}: {self.expr}"


@dataclass(frozen=True, slots=True)
class Series:
    """One series of an answer: Unix times and values, those that are no numbers left out."""

    labels: dict[str, str]
    times_s: tuple[float, ...]
    values: tuple[float, ...]


def panel_queries(folder: Path = DASHBOARDS) -> Iterator[PanelQuery]:
    """Every expression of every panel."""
    for path in sorted(folder.glob("*.json")):
        dashboard = json.loads(path.read_text(encoding="utf-8"))
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                legend = target.get("legendFormat", panel["title"])
                yield PanelQuery(dashboard["title"], panel["title"], legend, target["expr"])


def variables(folder: Path = DASHBOARDS) -> set[str]:
    """The names of the variables that select series."""
    return {
        variable["name"]
        for path in folder.glob("*.json")
        for variable in json.loads(path.read_text(encoding="utf-8"))["templating"]["list"]
        if variable["type"] == "query"
    }


def filled_in(expr: str, rate_interval: str) -> str:
    """An expression with everything selected."""
    for name in sorted(variables(), key=len, reverse=True):
        expr = expr.replace(f"${name}", EVERYTHING)
    return expr.replace("$__rate_interval", rate_interval)


def ask(url: str, expr: str, *, start_s: float, end_s: float, step_s: float) -> list[Series]:
    """The series of an expression over a time, those without any number left out.

    Args:
        url: of the Prometheus.

    Raises:
        BadExpressionError: Prometheus does not understand it.
    """
    values: dict[str, Any] = {"query": expr, "start": start_s, "end": end_s, "step": step_s}
    query = urllib.parse.urlencode(values)
    try:
        page = urllib.request.urlopen(f"{url}/api/v1/query_range?{query}", timeout=TIMEOUT_S)  # noqa: S310
    except urllib.error.HTTPError as error:
        raise BadExpressionError(f"{expr}: {json.load(error)['error']}") from None
    with page as reply:
        found = json.load(reply)["data"]["result"]
    read = (_series(one["metric"], one["values"]) for one in found)
    return [series for series in read if series.values]


def without_data(url: str, *, start_s: float, end_s: float, rate_interval: str) -> list[PanelQuery]:
    """The expressions that no series answers."""
    step_s = max(0.5, (end_s - start_s) / 60)
    return [
        query
        for query in panel_queries()
        if not ask(
            url,
            filled_in(query.expr, rate_interval),
            start_s=start_s,
            end_s=end_s,
            step_s=step_s,
        )
    ]


def _series(labels: dict[str, str], pairs: list[tuple[float, str]]) -> Series:
    numbers = [(time_s, float(text)) for time_s, text in pairs]
    finite = [(time_s, value) for time_s, value in numbers if math.isfinite(value)]
    times_s, values = zip(*finite, strict=True) if finite else ((), ())
    return Series(labels, tuple(times_s), tuple(values))
