"""How Shoal's panels look: one function for each kind, with what every panel must have.

Owns sizes, colours, variables, annotations and links. What is shown is each dashboard's own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from grafana_foundation_sdk.builders import (
    common,
    dashboard,
    heatmap,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as models
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DashboardSpecialValueMapOptions,
    DataSourceRef,
    DataTransformerConfig,
    FieldColorModeId,
    Panel,
    RowPanel,
    SpecialValueMap,
    SpecialValueMatch,
    Threshold,
    ThresholdsMode,
    ValueMap,
    ValueMapping,
    ValueMappingResult,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
RATE = "[$__rate_interval]"
# Where Grafana serves ops/README.md if that is mounted there; in Grafana it is a variable, for
# whoever keeps the runbook elsewhere.
RUNBOOK = "/public/shoal/README.md"

GREEN, YELLOW, RED, BLUE = "green", "yellow", "red", "blue"
STAT_SPAN, STAT_HEIGHT = 4, 4
GRAPH_HEIGHT = 8

AnyPanel: TypeAlias = Any  # The SDK's panel builders have their methods in common, and no type.
Kind = TypeVar("Kind", bound=AnyPanel)


@dataclass(frozen=True, slots=True)
class Query:
    """One expression and the name of its series."""

    expr: str
    legend: str = ""


def quantile(q: float, metric: str, selector: str, by: str = "") -> str:
    """A quantile of a histogram's rate, over all workers."""
    labels = f"le, {by}" if by else "le"
    return (
        f"histogram_quantile({q:g}, sum by ({labels}) (rate({metric}_bucket{{{selector}}}{RATE})))"
    )


def total_rate(metric: str, selector: str, by: str = "") -> str:
    """A counter's increase a second, over all workers."""
    grouped = f" by ({by})" if by else ""
    return f"sum{grouped} (rate({metric}{{{selector}}}{RATE}))"


def share(part: str, whole: str) -> str:
    """Part of a whole, 0 where there is nothing at all."""
    return f"{part} / clamp_min({whole}, 1e-9)"


def stat_panel(
    title: str,
    description: str,
    expr: str,
    unit: str,
    *,
    anchor: str,
    warn: float | None = None,
    bad: float | None = None,
    low_is_bad: bool = False,
    decimals: int | None = None,
) -> stat.Panel:
    """One number, its colour by thresholds, and its course behind it."""
    steps = _steps(warn, bad, low_is_bad=low_is_bad)
    panel = (
        stat.Panel()
        .unit(unit)
        .thresholds(dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps))
        .color_scheme(dashboard.FieldColor().mode(FieldColorModeId.THRESHOLDS))
        .graph_mode(models.BigValueGraphMode.AREA)
        .color_mode(models.BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .mappings([_words_for_what_is_no_number()])
    )
    if decimals is not None:
        panel = panel.decimals(decimals)
    sized = panel.span(STAT_SPAN).height(STAT_HEIGHT)
    return _common(sized, title, description, [Query(expr)], anchor)


def graph(
    title: str,
    description: str,
    queries: Sequence[Query],
    unit: str,
    *,
    anchor: str,
    stacked: bool = False,
    bars: bool = False,
    span: int = 12,
    limit: float | None = None,
    top: float | None = None,
) -> timeseries.Panel:
    """Lines over time, stacked areas, or bars; `limit` draws a line at a threshold."""
    panel = (
        timeseries.Panel()
        .unit(unit)
        .min(0)
        .line_width(1)
        .fill_opacity(30 if stacked else 8)
        .show_points(models.VisibilityMode.NEVER)
        .legend(
            common.VizLegendOptions()
            .display_mode(models.LegendDisplayMode.TABLE)
            .placement(models.LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(
            common.VizTooltipOptions()
            .mode(models.TooltipDisplayMode.MULTI)
            .sort(models.SortOrder.DESCENDING)
        )
        .span(span)
        .height(GRAPH_HEIGHT)
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(models.StackingMode.NORMAL))
    if bars:
        panel = panel.draw_style(models.GraphDrawStyle.BARS).fill_opacity(60)
    if top is not None:
        panel = panel.max(top)
    if limit is not None:
        style = common.GraphThresholdsStyleConfig().mode(models.GraphThresholdsStyleMode.DASHED)
        steps = _steps(None, limit, low_is_bad=False)
        thresholds = dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
        panel = panel.thresholds(thresholds).thresholds_style(style)
    return _common(panel, title, description, queries, anchor)


def heat(
    title: str, description: str, query: Query, unit: str, *, anchor: str, span: int = 12
) -> heatmap.Panel:
    """A histogram's buckets over time."""
    panel = (
        heatmap.Panel()
        .calculate(False)
        .y_axis(heatmap.YAxisConfig().unit(unit))
        .color(heatmap.HeatmapColorOptions().scheme("Oranges").steps(64))
        .cell_values(heatmap.CellValues().unit("reqps"))
        .unit(unit)
        .span(span)
        .height(GRAPH_HEIGHT)
    )
    return _common(panel, title, description, [query], anchor, as_heatmap=True)


def states(
    title: str, description: str, queries: Sequence[Query], *, anchor: str, span: int = 12
) -> statetimeline.Panel:
    """What is 1 while all is well, over time."""
    words = ValueMap(
        options={
            "0": ValueMappingResult(text="no", color=RED, index=0),
            "1": ValueMappingResult(text="yes", color=GREEN, index=1),
        }
    )
    panel = statetimeline.Panel().unit("none").mappings([words]).span(span).height(GRAPH_HEIGHT)
    return _common(panel, title, description, queries, anchor)


def instance_table(
    title: str, description: str, queries: Sequence[Query], *, anchor: str, hidden: Sequence[str]
) -> table.Panel:
    """A line for each worker: one query for each column, joined by `instance`."""
    panel = table.Panel().unit("short").span(24).height(GRAPH_HEIGHT)
    panel = _common(panel, title, description, queries, anchor, as_table=True)
    names = {f"Value #{_ref(i)}": query.legend for i, query in enumerate(queries)}
    excluded = dict.fromkeys(hidden, True)
    return panel.with_transformation(
        DataTransformerConfig(
            id_val="joinByField", options={"byField": "instance", "mode": "outer"}
        )
    ).with_transformation(
        DataTransformerConfig(
            id_val="organize", options={"renameByName": names, "excludeByName": excluded}
        )
    )


def board(
    title: str,
    uid: str,
    description: str,
    content: Iterable[str | AnyPanel],
    *,
    variables: Sequence[tuple[str, str, str]],
    restarts: str,
) -> dashboard.Dashboard:
    """A dashboard of rows (given by their titles) and panels.

    Args:
        variables: name, label and query of each one that selects series.
        restarts: selects the engine processes whose restarts are marked.
    """
    built = (
        dashboard.Dashboard(title)
        .uid(uid)
        .description(description)
        .tags(["shoal"])
        .refresh("10s")
        .time("now-30m", "now")
        .timezone("browser")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(
            dashboard.DatasourceVariable("datasource").label("Data source").type("prometheus")
        )
        .with_variable(dashboard.ConstantVariable("runbook").label("Runbook").value(RUNBOOK))
        .annotation(
            dashboard.AnnotationQuery()
            .name("Restarts")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color(RED)
            .expr(f"changes(shoal_engine_process_start_time_seconds{{{restarts}}}[1m]) > 0")
        )
        .annotation(
            dashboard.AnnotationQuery()
            .name("Redis restarts")
            .datasource(DATASOURCE)
            .enable(True)
            .icon_color(YELLOW)
            .expr("changes(shoal_redis_start_time_seconds[1m]) > 0")
        )
        .link(dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK).url("${runbook}"))
        .link(
            dashboard.DashboardLink("Shoal")
            .type(DashboardLinkType.DASHBOARDS)
            .tags(["shoal"])
            .keep_time(True)
            .include_vars(True)
        )
    )
    for name, label, query in variables:
        built = built.with_variable(_selection(name, label, query))
    for number, one in enumerate(content, 1):
        if isinstance(one, str):
            built = built.with_row(dashboard.Row(one).id(number))
        else:
            built = built.with_panel(one.id(number))
    return built


def panels_of(model: Any) -> list[Panel]:
    """The panels of a built dashboard, rows left out."""
    return [panel for panel in model.panels if not isinstance(panel, RowPanel)]


def _selection(name: str, label: str, query: str) -> dashboard.QueryVariable:
    everything = VariableOption(text="All", value="$__all", selected=True)
    return (
        dashboard.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(everything)
    )


def _common(
    panel: Kind,
    title: str,
    description: str,
    queries: Sequence[Query],
    anchor: str,
    *,
    as_heatmap: bool = False,
    as_table: bool = False,
) -> Kind:
    link = dashboard.DashboardLink("Runbook").type(DashboardLinkType.LINK)
    built: Kind = (
        panel.title(title)
        .description(description)
        .datasource(DATASOURCE)
        .links([link.url(f"${{runbook}}#{anchor}")])
    )
    for i, query in enumerate(queries):
        target = prometheus.Dataquery().expr(query.expr).ref_id(_ref(i)).datasource(DATASOURCE)
        target = target.instant() if as_table else target.range()
        if as_table:
            target = target.format(PromQueryFormat.TABLE)
        elif as_heatmap:
            target = target.format(PromQueryFormat.HEATMAP).legend_format("{{le}}")
        else:
            target = target.legend_format(query.legend or title)
        built = built.with_target(target)
    return built


def _ref(number: int) -> str:
    return chr(ord("A") + number)


def _steps(warn: float | None, bad: float | None, *, low_is_bad: bool) -> list[Threshold]:
    first, last = (RED, GREEN) if low_is_bad else (GREEN, RED)
    if warn is None and bad is None:
        return [Threshold(color=BLUE)]
    if low_is_bad:
        marks = [(bad, YELLOW if warn is not None else GREEN), (warn, last)]
    else:
        marks = [(warn, YELLOW), (bad, last)]
    steps = [Threshold(value=value, color=color) for value, color in marks if value is not None]
    return [Threshold(color=first), *steps]


def _words_for_what_is_no_number() -> ValueMapping:
    text = ValueMappingResult(text="–", index=0)
    return SpecialValueMap(
        options=DashboardSpecialValueMapOptions(match=SpecialValueMatch.NULL_AND_NAN, result=text)
    )
