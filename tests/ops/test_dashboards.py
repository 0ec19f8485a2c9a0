"""The dashboards as they are committed: current, and as good as a look at each panel would ask."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from ops.every_metric import exporter_names, worker_names
from ops.grafana.generate import DASHBOARDS, FOLDER, text_of
from ops.grafana.queries import panel_queries, variables
from ops.metric_tables import with_tables
from ops.vllm_names import RULES, VLLM, rules

ROOT = Path(__file__).resolve().parents[2]
STANDARD = {"process_cpu_seconds_total", "process_resident_memory_bytes"}
WIDTH = 24


def dashboards() -> Iterator[dict[str, Any]]:
    for path in sorted(FOLDER.glob("*.json")):
        yield json.loads(path.read_text(encoding="utf-8"))


def panels() -> Iterator[tuple[str, dict[str, Any]]]:
    for dashboard in dashboards():
        for panel in dashboard["panels"]:
            if panel["type"] != "row":
                yield f"{dashboard['title']} / {panel['title']}", panel


PANELS = [pytest.param(panel, id=name) for name, panel in panels()]
EXPRESSIONS = sorted({query.expr for query in panel_queries()})


def all_names() -> set[str]:
    """Every series name that a worker or the exporter has."""
    return worker_names() | exporter_names() | STANDARD


@pytest.mark.parametrize("name", DASHBOARDS)
def test_the_committed_file_is_what_the_code_makes(name: str) -> None:
    assert (FOLDER / f"{name}.json").read_text(encoding="utf-8") == text_of(DASHBOARDS[name])


def test_no_file_is_left_of_a_dashboard_that_is_no_more() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(DASHBOARDS)


def test_dashboards_have_fixed_uids_titles_and_a_refresh() -> None:
    found = {one["uid"]: one for one in dashboards()}

    assert set(found) == set(DASHBOARDS)
    assert {one["title"] for one in found.values()} == {
        *("Shoal overview", "Shoal bulk run", "Shoal worker")
    }
    assert all(one["refresh"] and one["description"] for one in found.values())


def test_each_dashboard_selects_its_data_source_and_model_and_marks_restarts() -> None:
    for dashboard in dashboards():
        by_name = {one["name"]: one for one in dashboard["templating"]["list"]}
        assert by_name["datasource"]["type"] == "datasource"
        assert by_name["model"]["multi"]
        assert any("Restarts" in one["name"] for one in dashboard["annotations"]["list"])
        assert any(link["url"] == "${runbook}" for link in dashboard["links"] if "url" in link)


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_says_what_it_shows_and_in_which_unit(panel: dict[str, Any]) -> None:
    assert panel["title"]
    assert panel["fieldConfig"]["defaults"]["unit"]
    description = panel["description"]
    assert description.endswith(".")
    assert len(description) > 30
    assert re.search(r"`(shoal|process)_\w+`", description), "it names its metric"


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_asks_the_selected_data_source(panel: dict[str, Any]) -> None:
    assert panel["targets"]
    for asked in (panel, *panel["targets"]):
        assert asked["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)


@pytest.mark.parametrize("panel", PANELS)
def test_every_panel_leads_to_a_section_of_the_runbook_that_is_there(panel: dict[str, Any]) -> None:
    runbook = (ROOT / "ops" / "README.md").read_text(encoding="utf-8")
    headings = re.findall(r"^#+ (.+)$", runbook, re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", one).strip().lower().replace(" ", "-") for one in headings}

    [link] = panel["links"]

    assert link["url"].startswith("${runbook}#")
    assert link["url"].partition("#")[2] in anchors


@pytest.mark.parametrize("panel", [one for one in PANELS if one.values[0]["type"] == "stat"])  # type: ignore[index]
def test_a_number_has_a_colour_by_thresholds(panel: dict[str, Any]) -> None:
    steps = panel["fieldConfig"]["defaults"]["thresholds"]["steps"]

    assert steps[0]["value"] is None
    values = [step["value"] for step in steps[1:]]
    assert values == sorted(values)


def test_no_two_panels_overlap_and_none_leaves_the_grid() -> None:
    for dashboard in dashboards():
        places = [panel["gridPos"] for panel in dashboard["panels"]]
        assert all(place["x"] + place["w"] <= WIDTH for place in places)
        for one, other in combinations(places, 2):
            assert (
                one["x"] + one["w"] <= other["x"]
                or other["x"] + other["w"] <= one["x"]
                or one["y"] + one["h"] <= other["y"]
                or other["y"] + other["h"] <= one["y"]
            ), (dashboard["title"], one, other)


def test_panels_have_ids_of_their_own() -> None:
    for dashboard in dashboards():
        ids = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_every_metric_of_an_expression_exists(expr: str) -> None:
    used = set(re.findall(r"\b((?:shoal|process)_[a-z0-9_]+)", expr))

    assert used
    assert used <= all_names()


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_rates_span_what_grafana_says_and_are_of_counters_alone(expr: str) -> None:
    assert set(re.findall(r"\[([^]]+)\]", expr)) <= {"$__rate_interval"}
    for function, metric in re.findall(r"\b(rate|increase|deriv)\((\w+)", expr):
        is_counter = metric.endswith(("_total", "_bucket", "_sum", "_count"))
        assert is_counter == (function != "deriv"), metric


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_counters_are_seen_through_their_rates(expr: str) -> None:
    gauges = {"shoal_decode_slots_total"}  # Its name is the public interface's.
    for metric in re.findall(r"\bshoal_\w+_total\b", expr):
        if metric not in gauges:
            assert re.search(rf"(rate|increase)\({metric}\b", expr), metric


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_a_quantile_keeps_the_buckets_apart(expr: str) -> None:
    if "histogram_quantile" in expr:
        assert re.search(r"sum by \(le\b", expr)


@pytest.mark.parametrize("expr", EXPRESSIONS)
def test_variables_of_expressions_are_there(expr: str) -> None:
    used = set(re.findall(r"\$(\w+)", expr)) - {"__rate_interval"}

    assert used <= variables()


def test_the_rules_for_vllm_s_names_are_current_and_of_metrics_that_exist() -> None:
    assert RULES.read_text(encoding="utf-8") == rules()
    used = set(re.findall(r"\bshoal_\w+", RULES.read_text(encoding="utf-8")))
    assert used <= all_names()
    assert len(VLLM) == 14


def test_the_runbook_s_tables_of_metrics_are_current() -> None:
    text = (ROOT / "ops" / "README.md").read_text(encoding="utf-8")

    assert text == with_tables(text), "run `make readme`"
