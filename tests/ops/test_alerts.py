"""Alerts: each is tested both ways, has a runbook entry whose commands exist, and real metrics."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from prometheus_client import CollectorRegistry

from shoal.cli.group import shoal as command_line
from shoal.exporter import NAMES
from shoal_worker.metrics import PrometheusMetrics

OPS = Path(__file__).parents[2] / "ops"
PROMETHEUS = OPS / "prometheus"
RUNBOOK = "ops/README.md#"
# Of Prometheus itself, of every Python process, and of NVIDIA's dcgm-exporter.
OF_OTHERS = {"up", "process_start_time_seconds", "DCGM_FI_DEV_XID_ERRORS"}
METRIC = re.compile(r"\b(?:shoal_\w+|up|process_\w+|DCGM_\w+)(?=[{\[) ]|$)", re.MULTILINE)


@cache
def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "alerts.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


@cache
def rule_tests() -> dict[str, dict[str, Any]]:
    tests = yaml.safe_load((PROMETHEUS / "alerts_test.yml").read_text())["tests"]
    assert len({test["name"] for test in tests}) == len(tests)
    return {test["name"]: test for test in tests}


@cache
def entries() -> dict[str, str]:
    """The runbook's third-level entries by their anchors."""
    text = (OPS / "README.md").read_text()
    parts = re.split(r"^#{1,3} ", text, flags=re.MULTILINE)[1:]
    titled = (part.partition("\n") for part in parts)
    return {
        re.sub(r"[^\w-]", "", title.lower().replace(" ", "-")): body for title, _, body in titled
    }


def promtool(*arguments: str) -> None:
    program = shutil.which("promtool")
    if program is None:
        assert os.environ.get("CI") != "true", "CI must have promtool (Debian: prometheus)"
        pytest.skip("promtool is not installed (Debian: prometheus)")
    ran = subprocess.run(
        [program, *arguments], cwd=PROMETHEUS, capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


named = pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])


@named
def test_each_alert_has_a_test_that_fires_and_one_that_stays_quiet(rule: dict[str, Any]) -> None:
    name = rule["alert"]
    tests = {kind: rule_tests().get(f"{name} {kind}") for kind in ("fires", "stays quiet")}
    if rule["expr"] == "vector(1)":
        del tests["stays quiet"]  # The watchdog never is.

    for kind, test in tests.items():
        assert test is not None, f"no test in which it {kind}"
        [expression] = test["promql_expr_test"]
        assert expression["expr"] == f'count(ALERTS{{alertname="{name}", alertstate="firing"}})'
        assert bool(expression["exp_samples"]) == (kind == "fires")
        assert test.get("input_series") or kind == "fires"


@named
def test_each_alert_says_how_bad_it_is_what_is_wrong_and_where_to_read_on(
    rule: dict[str, Any],
) -> None:
    assert rule["labels"]["severity"] in ("page", "ticket", "none")
    assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
    anchor = rule["annotations"]["runbook_url"].removeprefix(RUNBOOK)
    assert anchor == rule["alert"].lower()
    assert any(shoal_commands(entries()[anchor])), "its entry has no `shoal` command"


def test_no_entry_is_left_of_an_alert_that_is_gone() -> None:
    alerts = {rule["alert"].lower() for rule in rules()}

    assert {anchor for anchor in entries() if re.fullmatch(r"shoal[a-z]+", anchor)} == alerts


def test_links_within_the_runbook_lead_somewhere() -> None:
    text = (OPS / "README.md").read_text()
    anchors = set(re.findall(r"\]\(#([\w-]+)\)", text))
    files = set(re.findall(r"\]\(([\w./-]+)\)", text))

    assert anchors <= set(entries())
    assert all((OPS / file).exists() for file in files), files


@pytest.mark.parametrize("anchor", sorted(entries()))
def test_the_runbook_s_shoal_commands_exist_with_their_options(anchor: str) -> None:
    for words in shoal_commands(entries()[anchor]):
        command = command_line.get_command(click.Context(command_line), words[1])
        assert command is not None, words
        options = {name for param in command.params for name in param.opts}
        assert {word for word in words if word.startswith("-")} <= options, words


def shoal_commands(text: str) -> list[list[str]]:
    blocks = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    words = [shlex.split(line) for line in lines]
    # A variable may stand before the command.
    bare = [[w for i, w in enumerate(line) if i or "=" not in w] for line in words]
    return [line for line in bare if line and line[0] == "shoal"]


@named
def test_each_alert_asks_for_metrics_that_exist(rule: dict[str, Any]) -> None:
    registry = CollectorRegistry()
    PrometheusMetrics(registry, model_name="m", queues=("q",), lanes={"l": 1})
    exposed = set(NAMES) | OF_OTHERS
    for family in registry.collect():
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
        exposed |= {family.name + suffix for suffix in suffixes.get(family.type, ("",))}
    exposed |= {f"{name}_total" for name in NAMES}

    asked = set(METRIC.findall(rule["expr"]))
    assert asked or rule["expr"] == "vector(1)"
    assert asked <= exposed, asked - exposed


def test_bulk_never_pages_for_latency() -> None:
    pages = [rule["expr"] for rule in rules() if rule["labels"]["severity"] == "page"]
    about_time = [
        expr for expr in pages if "latency" in expr or "_age_" in expr or "queue_time" in expr
    ]

    assert about_time
    for expr in about_time:
        selectors = re.findall(r"shoal_\w+\{([^}]*)\}", expr)
        assert selectors
        assert all('queue!~".*-bulk"' in selector for selector in selectors)


@pytest.mark.server
def test_promtool_finds_no_fault_with_the_rules() -> None:
    promtool("check", "rules", "--lint=all", "alerts.yml")


@pytest.mark.server
def test_every_alert_fires_when_it_should_and_only_then() -> None:
    promtool("test", "rules", "alerts_test.yml")
