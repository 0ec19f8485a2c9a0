"""ops/systemd: systemd finds no fault, and a unit's instance becomes a device and a port."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.ops.composition import ROOT

from shoal_worker.settings import WorkerSettings, variable

SYSTEMD = ROOT / "ops" / "systemd"
UNITS = ("shoal-exporter.service", "shoal-worker@.service")
SHOAL = "/opt/shoal/bin/shoal"


def value(unit: str, key: str) -> str:
    found = re.findall(rf"^{key}=(.*)$", (SYSTEMD / unit).read_text(), flags=re.MULTILINE)
    assert len(found) == 1, (key, found)
    return str(found[0])


@pytest.mark.server
@pytest.mark.parametrize("unit", UNITS)
def test_systemd_finds_no_fault(unit: str, tmp_path: Path) -> None:
    program = shutil.which("systemd-analyze")
    if program is None:
        assert os.environ.get("CI") != "true", "CI must have systemd-analyze (Debian: systemd)"
        pytest.skip("systemd-analyze is not installed (Debian: systemd)")
    # Where the command is, is all that this machine lacks.
    text = (SYSTEMD / unit).read_text().replace(SHOAL, "/bin/true")
    path = tmp_path / unit.replace("@.", "@0.")
    path.write_text(text)
    ran = subprocess.run(
        [program, "verify", "--man=no", str(path)], capture_output=True, text=True, check=False
    )

    assert (ran.returncode, ran.stdout + ran.stderr) == (0, "")


@pytest.mark.parametrize(
    ("instance", "arguments"),
    [
        ("0", "worker --device cuda:0 --metrics-port 9470"),
        ("3", "worker --device cuda:3 --metrics-port 9473"),
        ("cpu", "worker --device cpu"),
        ("all", "worker --device all"),
    ],
)
def test_an_instance_is_a_device_and_a_port(instance: str, arguments: str) -> None:
    line = value("shoal-worker@.service", "ExecStart").replace("%i", instance)
    # systemd would put variables in here; what is left for the shell it takes as it is.
    assert not re.findall(r"\$\{|\$[A-Za-z_]", line)
    words = shlex.split(line.replace(f"exec {SHOAL}", "echo"))
    ran = subprocess.run(words, capture_output=True, text=True, check=True)

    assert ran.stdout.strip() == arguments


def test_a_stop_leaves_the_drain_its_time() -> None:
    limit_s = int(value("shoal-worker@.service", "TimeoutStopSec"))

    assert limit_s > WorkerSettings(model="m").drain_timeout_s + 10


@pytest.mark.parametrize("unit", UNITS)
def test_every_variable_is_read_by_something_and_secrets_are_credentials(unit: str) -> None:
    text = (SYSTEMD / unit).read_text()
    ours = set(re.findall(r"^Environment=(SHOAL_\w+)=", text, flags=re.MULTILINE))
    known = {variable(name) for name in WorkerSettings.model_fields}

    assert ours <= known | {"SHOAL_EMBEDDED", "SHOAL_HOME", "SHOAL_REDIS_URL_FILE"}
    assert "Environment=SHOAL_REDIS_URL_FILE=%d/redis_url" in text
    assert value(unit, "LoadCredential").startswith("redis_url:")
