"""ops/k8s: it builds, pods drain before they are killed, and nothing scales to zero by mistake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tests.conftest import wait_until
from tests.ops.composition import ROOT

from shoal import Client
from shoal.cli.group import shoal as command_line
from shoal_worker import cli
from shoal_worker.settings import WorkerSettings

K8S = ROOT / "ops" / "k8s"


@cache
def resources() -> dict[str, dict[str, Any]]:
    """By kind and name, as the files have them."""
    names = yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]
    found = [one for name in names for one in yaml.safe_load_all((K8S / name).read_text())]
    return {f"{one['kind']}/{one['metadata']['name']}": one for one in found}


def pod(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = resources()[f"Deployment/{name}"]["spec"]["template"]["spec"]
    return spec


def program(name: str, package: str) -> str:
    found = shutil.which(name)
    if found is None:
        assert os.environ.get("CI") != "true", f"CI must have {name} (Debian: {package})"
        pytest.skip(f"{name} is not installed (Debian: {package})")
    return found


@pytest.mark.server
def test_kustomize_builds_it() -> None:
    kubectl = program("kubectl", "kubernetes-client")
    built = subprocess.run(
        [kubectl, "kustomize", str(K8S)], capture_output=True, text=True, check=False
    )

    assert built.returncode == 0, built.stderr
    found = list(yaml.safe_load_all(built.stdout))
    assert len(found) == len(resources())
    assert {one["metadata"].get("namespace", "shoal") for one in found} == {"shoal"}


def test_every_file_is_part_of_it() -> None:
    listed = yaml.safe_load((K8S / "kustomization.yaml").read_text())["resources"]

    assert {path.name for path in K8S.glob("*.yaml")} == {*listed, "kustomization.yaml"}


def test_the_rules_are_those_of_prometheus() -> None:
    subprocess.run([sys.executable, str(K8S / "rules.py"), "--check"], check=True)
    groups = resources()["PrometheusRule/shoal"]["spec"]["groups"]
    files = ("alerts.yml", "recording.yml")
    folder = ROOT / "ops" / "prometheus"

    assert groups == [
        group for name in files for group in yaml.safe_load((folder / name).read_text())["groups"]
    ]


@pytest.mark.parametrize("name", ["shoal-worker", "shoal-exporter"])
def test_pods_meet_the_restricted_standard(name: str) -> None:
    spec = pod(name)
    [container] = spec["containers"]

    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert spec["automountServiceAccountToken"] is False
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    volumes = {volume["name"] for volume in spec["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes


def test_the_worker_takes_its_arguments_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    [container] = pod("shoal-worker")["containers"]
    environ = {one["name"]: one["value"] for one in container["env"]}
    read: list[WorkerSettings] = []
    monkeypatch.setattr(cli, "serve", read.append)
    monkeypatch.setattr(cli, "configure", lambda *_: None)

    outcome = CliRunner().invoke(command_line, container["args"], env=environ)

    assert outcome.exit_code == 0, outcome.output
    [settings] = read
    assert settings.metrics_port == container["ports"][0]["containerPort"]
    assert pod("shoal-worker")["terminationGracePeriodSeconds"] > settings.drain_timeout_s + 10
    # What the kubelet ends must be more than what the worker mends itself.
    liveness = container["livenessProbe"]
    assert liveness["periodSeconds"] * liveness["failureThreshold"] > settings.hang_timeout_s
    assert Path(environ["SHOAL_REDIS_URL_FILE"]).parent == Path(
        next(one["mountPath"] for one in container["volumeMounts"] if one["name"] == "redis")
    )


def test_the_pre_stop_hook_waits_for_the_drain(redis_url: str) -> None:
    [container] = pod("shoal-worker")["containers"]
    shell, option, script = container["lifecycle"]["preStop"]["exec"]["command"]
    command = [sys.executable, "-m", "tests.scripted_engine", redis_url, "--delay-s", "1"]
    with (
        Client(redis_url) as client,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as worker,
    ):
        assert worker.stdout is not None
        assert worker.stdout.readline().startswith("ready")
        job = client.submit("held")
        wait_until(lambda: job.status == "started", "the worker holds it")
        # In a container it is process 1, whose end ends the hook.
        mine = script.replace("-TERM 1;", f"-TERM {worker.pid};").replace(
            "kill -0 1 ", f"kill -0 {worker.pid} "
        )
        assert mine.count(str(worker.pid)) == 2
        with subprocess.Popen([shell, option, mine]) as hook:
            code = worker.wait(30)
            still_waiting = hook.poll() is None
            assert hook.wait(30) == 0

        assert (code, job.result(1).text) == (0, "HELD")
    assert still_waiting


def test_prometheus_finds_both_under_the_names_of_the_alerts() -> None:
    monitor = resources()["PodMonitor/shoal"]["spec"]
    wanted = monitor["selector"]["matchLabels"].items()
    for name in ("shoal-worker", "shoal-exporter"):
        template = resources()[f"Deployment/{name}"]["spec"]["template"]
        assert template["metadata"]["labels"][monitor["jobLabel"]] == name
        assert wanted <= template["metadata"]["labels"].items()
        [container] = template["spec"]["containers"]
        assert monitor["podMetricsEndpoints"][0]["port"] == container["ports"][0]["name"]


def test_a_missing_metric_never_scales_to_zero() -> None:
    scaled = resources()["ScaledObject/shoal-worker"]["spec"]
    [trigger] = scaled["triggers"]

    assert scaled["scaleTargetRef"]["name"] == "shoal-worker"
    assert "replicas" not in resources()["Deployment/shoal-worker"]["spec"]
    assert trigger["metadata"]["ignoreNullValues"] == "false"
    assert scaled["fallback"]["replicas"] >= scaled["minReplicaCount"] >= 1
    # KEDA takes strings alone there.
    assert all(isinstance(value, str) for value in trigger["metadata"].values())


REDIS_SAYS = 'shoal_queue_requests{queue="q"}', "700"
WORKERS_SAY = [
    ('shoal_requests_running{model_name="m",instance="a"}', "40"),
    ('shoal_requests_waiting{model_name="m",instance="a"}', "20"),
    ('shoal_requests_running{model_name="m",instance="b"}', "30"),
    ('shoal_requests_waiting{model_name="m",instance="b"}', "10"),
]


@pytest.mark.server
@pytest.mark.parametrize(
    ("series", "answer"),
    [
        ([REDIS_SAYS, *WORKERS_SAY], [{"labels": "{}", "value": 800}]),
        ([REDIS_SAYS], [{"labels": "{}", "value": 700}]),  # Scaled to none, or all still loading.
        (WORKERS_SAY, []),  # The exporter is away: no answer, which is an error.
        ([], []),
    ],
)
def test_the_scaler_s_query_counts_what_waits_and_what_runs(
    series: list[tuple[str, str]], answer: list[dict[str, object]], tmp_path: Path
) -> None:
    promtool = program("promtool", "prometheus")
    [trigger] = resources()["ScaledObject/shoal-worker"]["spec"]["triggers"]
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": f"{value}x5"} for name, value in series],
        "promql_expr_test": [
            {"expr": trigger["metadata"]["query"], "eval_time": "5m", "exp_samples": answer}
        ],
    }
    (tmp_path / "test.yml").write_text(yaml.safe_dump({"tests": [test]}))
    ran = subprocess.run(
        [promtool, "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
