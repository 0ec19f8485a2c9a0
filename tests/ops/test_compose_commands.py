"""Every service's own command line and health check, run here: no container, the same words.

Only what a container would map is replaced: paths, ports, and the names of programs that Redis and
Valkey call differently. Grafana and dcgm-exporter are in no package that could be installed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from tests.conftest import wait_until
from tests.faults.server import free_port, require_server, server_binary
from tests.ops.composition import ROOT, services

SHOAL = [sys.executable, "-c", "from shoal.cli import main; main()"]


def replaced(words: list[str], changes: Mapping[str, str]) -> list[str]:
    for old, new in changes.items():
        words = [word.replace(old, new) for word in words]
    return words


@contextmanager
def running(words: list[str], **environ: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | environ,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def is_healthy(name: str, changes: Mapping[str, str], *options: str) -> bool:
    """What the service's own health check says."""
    kind, *words = services()[name]["healthcheck"]["test"]
    assert kind == "CMD"
    program, *arguments = replaced(words, changes)
    ran = subprocess.run(
        [program, *options, *arguments], capture_output=True, check=False, timeout=20
    )
    return ran.returncode == 0


@contextmanager
def redis_service(folder: Path, port: int) -> Iterator[None]:
    changes = {
        "/etc/valkey/redis.conf": str(ROOT / "ops/redis/redis.conf"),
        "/run/secrets/redis_users": str(folder / "secrets/users.acl"),
        "/data": str(folder),
    }
    program, *words = replaced(services()["redis"]["command"], changes)
    assert program == "valkey-server"
    with running([server_binary(), *words, "--port", str(port), "--bind", "127.0.0.1"]):
        client = shutil.which("redis-cli") or shutil.which("valkey-cli")
        if client is None:
            assert os.environ.get("CI") != "true", "CI must have redis-cli (Debian: redis-tools)"
            pytest.skip("redis-cli is not installed (Debian: redis-tools)")
        # Its words ask the default port.
        asking = {"valkey-cli": client}
        wait_until(lambda: is_healthy("redis", asking, "-p", str(port)), "redis is healthy")
        yield


def shoal_environment(name: str, folder: Path, port: int) -> dict[str, str]:
    environ = {key: str(value) for key, value in services()[name]["environment"].items()}
    secret = environ["SHOAL_REDIS_URL_FILE"].replace("/run/secrets", str(folder / "secrets"))
    return environ | {
        "SHOAL_REDIS_URL_FILE": secret,
        "SHOAL_EMBEDDED": "0",
        "SHOAL_METRICS_HOST": "127.0.0.1",
        "SHOAL_METRICS_PORT": str(port),
    }


@pytest.mark.server
def test_redis_worker_exporter_and_a_bulk_run_work_together(tmp_path: Path) -> None:
    require_server()
    port, worker_port, exporter_port = free_port(), free_port(), free_port()
    make = [sys.executable, str(ROOT / "ops/redis/make_secrets.py"), str(tmp_path / "secrets")]
    subprocess.run([*make, "--address", f"127.0.0.1:{port}"], check=True, capture_output=True)
    (tmp_path / "prompts.txt").write_text("Once upon\nThis function\n")
    at = {"worker": {"9470": str(worker_port)}, "exporter": {"9471": str(exporter_port)}}
    for changes in at.values():
        changes["python"] = sys.executable

    with ExitStack() as stack:
        environ = shoal_environment("exporter", tmp_path, exporter_port)
        command = [*SHOAL, *services()["exporter"]["command"]]
        stack.enter_context(running(command, **environ))
        wait_until(lambda: is_healthy("exporter", at["exporter"]), "the exporter is healthy")
        before = scraped(exporter_port)
        stack.enter_context(redis_service(tmp_path, port))
        environ = shoal_environment("worker", tmp_path, worker_port)
        # Small lanes and one thread: the model is the real one, the machine is shared.
        quick = {"SHOAL_LANES": "interactive=2x128,bulk=4x128", "SHOAL_THREADS": "1"}
        command = [*SHOAL, *services()["worker"]["command"]]
        stack.enter_context(running(command, **environ, **quick))
        was_ready_at_once = is_healthy("worker", at["worker"])
        wait_until(lambda: is_healthy("worker", at["worker"]), "the worker is ready", 120)
        bulk = subprocess.run(
            [*SHOAL, *replaced(services()["bulk"]["command"], {"/corpus": str(tmp_path)})],
            env=os.environ | shoal_environment("bulk", tmp_path, 0),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        after = scraped(exporter_port)

    assert bulk.returncode == 0, bulk.stderr
    assert len((tmp_path / "completions.jsonl").read_text().splitlines()) == 2
    assert not was_ready_at_once
    assert "shoal_redis_up 0.0" in before
    assert "shoal_redis_up 1.0" in after
    assert 'shoal_bulk_run_rows{output="completions.jsonl"' in after


def scraped(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


@pytest.mark.server
def test_prometheus_takes_its_command_and_loads_all_rules(tmp_path: Path) -> None:
    program = shutil.which("prometheus")
    if program is None:
        assert os.environ.get("CI") != "true", "CI must have prometheus (Debian: prometheus)"
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    changes = {"/etc/prometheus": str(ROOT / "ops/prometheus"), "=/prometheus": f"={tmp_path}"}
    words = replaced(services()["prometheus"]["command"], changes)
    url = f"127.0.0.1:{free_port()}"

    with running([program, *words, f"--web.listen-address={url}"]):
        wait_until(lambda: answers(f"http://{url}/-/ready"), "Prometheus is ready")
        with urllib.request.urlopen(f"http://{url}/api/v1/rules", timeout=10) as answer:
            groups = json.load(answer)["data"]["groups"]

    files = {Path(group["file"]).name for group in groups}
    assert files == {"alerts.yml", "recording.yml"}
    assert services()["prometheus"]["healthcheck"]["test"][-1].endswith(":9090/-/ready")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
