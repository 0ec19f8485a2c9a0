"""docker-compose.yml and its images: well-formed, hardened, and made of settings that exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner
from tests.ops.composition import ROOT, composition, seconds, services

from shoal.cli.group import shoal as command_line
from shoal.redis_url import resolve_url
from shoal_worker import cli
from shoal_worker.settings import WorkerSettings, variable

DOCKER = ROOT / "ops" / "docker"
DCLINT = "dclint@3.1.0"
OURS = ("bulk", "exporter", "worker", "worker-gpu")
SECRETS = {
    "users.acl", "worker_redis_url", "producer_redis_url", "exporter_redis_url",
    "grafana_admin_password",
}  # fmt: skip

each = pytest.mark.parametrize("name", sorted(services()))


def run(*words: str | Path, **options: Any) -> None:
    ran = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120, **options
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.server
def test_compose_s_schema_and_linter_find_no_fault() -> None:
    npx = shutil.which("npx")
    if npx is None:
        assert os.environ.get("CI") != "true", "CI must have npx (Debian: npm)"
        pytest.skip("npx is not installed (Debian: npm)")
    run(npx, "--yes", DCLINT, "--max-warnings", "0", "docker-compose.yml")


def test_hadolint_finds_no_fault() -> None:
    program = Path(sys.executable).with_name("hadolint")
    run(program, DOCKER / "Dockerfile")


def test_the_images_locks_are_parts_of_the_one_lock() -> None:
    run(sys.executable, DOCKER / "locks.py", "--check")


def test_a_lock_has_what_an_image_needs_and_no_more() -> None:
    locked = {
        path.stem: set(re.findall(r"^([\w.-]+)", path.read_text(), flags=re.MULTILINE))
        for path in DOCKER.glob("*.lock")
    }

    assert {"redis", "rq", "pyarrow", "prometheus-client"} <= locked["producer"]
    assert locked["producer"] < locked["worker"]
    assert {"transformers", "tokenizers", "safetensors"} <= locked["worker"] - locked["producer"]
    assert not {"torch", "pytest", "datasets", "ruff"} & (locked["worker"] | locked["build"])


def test_what_images_are_built_from_is_there_and_not_ignored() -> None:
    text = (DOCKER / "Dockerfile").read_text()
    allowed = [
        line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"
    ]
    copied = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", text, flags=re.MULTILINE)
        for source in line.split()[:-1]
    ]

    assert copied
    for source in copied:
        assert (ROOT / source).exists(), source
        assert any(Path(source).match(pattern) for pattern in allowed), source
    stages = set(re.findall(r" AS ([\w-]+)$", text, flags=re.MULTILINE))
    for service in services().values():
        assert service.get("build", {}).get("target", "producer") in stages


def test_the_image_s_torch_is_the_makefile_s() -> None:
    [wanted] = re.findall(r"^TORCH \?= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)

    assert f"ARG TORCH={wanted}\n" in (DOCKER / "Dockerfile").read_text()


@each
def test_each_service_is_hardened(name: str) -> None:
    service = services()[name]

    assert re.fullmatch(r"[1-9]\d*:\d+", service["user"]), "not root, and by number"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["init"] is True
    assert set(service["logging"]["options"]) == {"max-file", "max-size"}
    assert any(mount.startswith("/tmp:size=") for mount in service["tmpfs"])
    assert service["restart"] == ("no" if name == "bulk" else "unless-stopped")
    assert "stop_grace_period" in service
    assert not service.keys() & {"privileged", "cap_add", "network_mode", "pid"}
    if name != "bulk":  # It ends by itself.
        assert "start_period" in service["healthcheck"]


@each
def test_only_prometheus_and_grafana_are_reached_from_the_host_and_by_it_alone(name: str) -> None:
    service = services()[name]
    networks = composition()["networks"]

    outside = [one for one in service["networks"] if not (networks[one] or {}).get("internal")]
    assert bool(outside) == ("ports" in service) == (name in ("grafana", "prometheus"))
    assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))


@each
def test_everything_a_service_names_is_there(name: str) -> None:
    service = services()[name]
    for secret in service.get("secrets", ()):
        path = Path(composition()["secrets"][secret]["file"])
        assert path.parent == Path("ops/docker/secrets")
        assert path.name in SECRETS
    for volume in service.get("volumes", ()):
        source = volume["source"] if isinstance(volume, dict) else volume.split(":")[0]
        made_by_user = source in ("./bulk", "./models")
        named = source in composition()["volumes"]
        assert made_by_user or named or (ROOT / source).exists(), source
    for other, how in service.get("depends_on", {}).items():
        assert how["condition"] == "service_healthy"
        assert "healthcheck" in services()[other]


def test_nothing_secret_is_in_a_variable() -> None:
    for service in services().values():
        for key, value in service.get("environment", {}).items():
            secret = re.search("PASSWORD|URL|TOKEN|KEY", key)
            assert not secret or str(value).startswith("/run/secrets/"), key


@pytest.mark.parametrize("name", ["worker", "worker-gpu"])
def test_a_worker_takes_its_command_and_variables(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service = services()[name]
    read: list[WorkerSettings] = []
    monkeypatch.setattr(cli, "serve", read.append)
    monkeypatch.setattr(cli, "serve_all", read.append)
    monkeypatch.setattr(cli, "configure", lambda *_: None)
    secret = tmp_path / "url"
    secret.write_text("redis://worker:x@redis:6379/0\n")

    environ = service["environment"] | {"SHOAL_REDIS_URL_FILE": str(secret)}
    outcome = CliRunner().invoke(command_line, service["command"], env=environ)

    assert outcome.exit_code == 0, outcome.output
    [settings] = read
    assert settings.device == {"worker": "cpu", "worker-gpu": "all"}[name]
    assert (settings.model, settings.metrics_host) == ("demo", "0.0.0.0")
    assert settings.log_format == "json"
    assert seconds(service["stop_grace_period"]) > settings.drain_timeout_s + 10
    assert f":{settings.metrics_port}/readyz" in service["healthcheck"]["test"][-1]
    assert resolve_url(None, environ) == "redis://worker:x@redis:6379/0"


@pytest.mark.parametrize("name", OURS)
def test_every_variable_of_ours_is_read_by_something(name: str) -> None:
    known = {variable(field) for field in WorkerSettings.model_fields} | {"SHOAL_REDIS_URL_FILE"}

    ours = {key for key in services()[name]["environment"] if key.startswith("SHOAL_")}
    assert ours <= known
    defaults = set(re.findall(r"\b(SHOAL_\w+)=", (DOCKER / "Dockerfile").read_text()))
    assert defaults <= known | {"SHOAL_EMBEDDED", "SHOAL_HOME"}


def test_prometheus_finds_the_services_by_name() -> None:
    config = yaml.safe_load((ROOT / "ops" / "prometheus" / "prometheus.yml").read_text())
    names: set[str] = set()
    for job in config["scrape_configs"]:
        for found in job.get("dns_sd_configs", ()):
            names |= set(found["names"])
        for static in job.get("static_configs", ()):
            names |= {target.partition(":")[0] for target in static["targets"]}

    assert names - {"localhost"} == {"worker", "worker-gpu", "exporter", "dcgm-exporter"}
    for name in names - {"localhost"}:
        assert "watch" in services()[name]["networks"]


def test_grafana_is_provisioned_with_the_dashboards() -> None:
    mounts = dict(mount.split(":")[:2] for mount in services()["grafana"]["volumes"])
    where = {target: ROOT / source for source, target in mounts.items() if source[0] == "."}
    provisioning = where["/etc/grafana/provisioning"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "shoal.yml").read_text())[
        "providers"
    ]
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())[
        "datasources"
    ]
    config = yaml.safe_load((ROOT / "ops" / "prometheus" / "prometheus.yml").read_text())

    assert len(list(where[provider["options"]["path"]].glob("*.json"))) >= 3
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    assert source["jsonData"]["timeInterval"] == config["global"]["scrape_interval"]
