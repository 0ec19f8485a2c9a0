"""`--device all`: one process a GPU, told apart by device and port, that fall and rise alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from tests.conftest import wait_until

from shoal.errors import InvalidRequest, ModelError
from shoal_worker import cli, fleet
from shoal_worker.fleet import environment, serve_fleet
from shoal_worker.settings import WorkerSettings, read_engine_settings, read_settings

# What `shoal worker --device all` does once it has counted the GPUs.
RUN = """
import sys
from shoal_worker.fleet import serve_fleet
from shoal_worker.settings import read_settings
from shoal.logs import configure

configure("info", "text")
settings = read_settings({"model": "demo", "device": "all", "metrics_port": 9500})
command = lambda *words: [sys.executable, "-m", "tests.scripted_member", *words]
sys.exit(serve_fleet(settings, "redis://h/0", int(sys.argv[1]), command=command, restart_s=0.01))
"""


@contextmanager
def fleet_of(folder: Path, **plans: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A fleet with these plans, one a device, in order."""
    script = {f"cuda:{index}": plan for index, plan in enumerate(plans.values())}
    (folder / "script.json").write_text(json.dumps(script))
    environ = os.environ | {"SCRIPT": str(folder / "script.json"), "STARTS": str(folder)}
    with subprocess.Popen(
        [sys.executable, "-c", RUN, str(len(plans))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def noted(folder: Path, device: str) -> list[str]:
    path = folder / device
    return path.read_text().splitlines() if path.exists() else []


def started(folder: Path, *devices: str) -> bool:
    return all(noted(folder, device) for device in devices)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_every_process_once_and_the_worst_exit_code_counts(
    tmp_path: Path, signum: int
) -> None:
    with fleet_of(tmp_path, first=["serve"], second=["give back"]) as process:
        assert process.stdout is not None
        out = [process.stdout.readline() for _ in range(2)]
        process.send_signal(signum)
        code, _out, _err = ended(process)

    assert code == 1
    assert sorted(out) == ["ready: scripted on cuda:0\n", "ready: scripted on cuda:1\n"]
    assert [noted(tmp_path, f"cuda:{i}")[1:] for i in range(2)] == [[f"signal {signum}"]] * 2


def test_each_process_has_a_device_and_a_port_of_its_own(tmp_path: Path) -> None:
    with fleet_of(tmp_path, first=["0"], second=["0"]) as process:
        assert ended(process)[0] == 0

    told = [json.loads(noted(tmp_path, f"cuda:{index}")[0]) for index in range(2)]
    assert [one["SHOAL_DEVICE"] for one in told] == ["cuda:0", "cuda:1"]
    assert [one["SHOAL_METRICS_PORT"] for one in told] == ["9500", "9501"]
    assert {one["SHOAL_REDIS_URL"] for one in told} == {"redis://h/0"}


def test_a_crash_of_one_leaves_the_others_alone_and_it_comes_back(tmp_path: Path) -> None:
    with fleet_of(tmp_path, first=["serve"], second=["ready 7", "serve"]) as process:
        wait_until(lambda: len(noted(tmp_path, "cuda:1")) == 2, "it was started again")
        wait_until(lambda: started(tmp_path, "cuda:0"), "the other runs")
        others = noted(tmp_path, "cuda:0")
        process.terminate()
        code, _out, err = ended(process)

    assert code == 0
    assert len(others) == 1
    assert "the worker on cuda:1 ended with exit code 7" in err


def test_a_killed_process_comes_back(tmp_path: Path) -> None:
    with fleet_of(tmp_path, first=["serve"]) as process:
        wait_until(lambda: started(tmp_path, "cuda:0"), "it runs")
        assert process.stdout is not None
        process.stdout.readline()
        os.kill(json.loads(noted(tmp_path, "cuda:0")[0])["pid"], signal.SIGKILL)
        wait_until(lambda: len(noted(tmp_path, "cuda:0")) == 2, "it was started again")
        process.terminate()
        code, _out, err = ended(process)

    assert code == 0
    assert "ended with exit code 137" in err


def test_what_never_served_is_left_out_and_told_by_the_exit_code(tmp_path: Path) -> None:
    with fleet_of(tmp_path, first=["serve"], second=["3"]) as process:
        wait_until(lambda: started(tmp_path, "cuda:0"), "the other runs")
        assert process.stderr is not None
        err = [process.stderr.readline() for _ in range(2)]
        process.terminate()
        code, _out, _err = ended(process)

    assert code == 3
    assert len(noted(tmp_path, "cuda:1")) == 1
    assert "the worker on cuda:1 ended with exit code 3" in err[0]
    assert "cuda:1 is left alone; the others go on" in err[1]


def test_what_served_and_then_fails_to_start_is_given_up_after_some_tries(tmp_path: Path) -> None:
    with fleet_of(tmp_path, first=["ready 7", "7"]) as process:
        code, _out, err = ended(process)

    assert code == 7
    assert len(noted(tmp_path, "cuda:0")) == 1 + fleet.MAX_FAILED_STARTS
    assert "cuda:0 is left alone" in err


def test_settings_survive_the_way_through_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values: dict[str, Any] = {
        "model": "demo", "device": "all", "name": "w", "queues": "a,b", "lease_s": 7.5,
        "warm_up": False, "burst": True, "metrics_port": 0, "log_format": "json",
        "export_queues": True, "max_in_flight": 12, "lanes": "bulk=8x64",
    }  # fmt: skip
    environ = environment(read_settings(values), "redis://h/1", 1)
    read: list[WorkerSettings] = []
    monkeypatch.setattr(cli, "serve", read.append)
    monkeypatch.setattr(cli, "configure", lambda *_: None)

    outcome = CliRunner().invoke(cli.worker, [], env=environ, catch_exceptions=False)

    assert outcome.exit_code == 0
    expected = values | {"device": "cuda:1", "name": "w-1", "export_queues": False}
    assert read[0] == read_settings(expected)
    assert environ["SHOAL_REDIS_URL"] == "redis://h/1"


def test_bad_numbers_of_gpus_and_ports_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = read_settings({"model": "demo", "device": "all", "metrics_port": 65_530})
    with pytest.raises(ModelError, match=r"for 8 GPUs it may be 65528 at most"):
        serve_fleet(settings, "redis://h/0", 8)
    monkeypatch.setattr(fleet, "_COUNT_GPUS", "print(0)")
    with pytest.raises(ModelError, match="torch sees no GPU here"):
        fleet.count_gpus()
    monkeypatch.setattr(fleet, "_COUNT_GPUS", "import no_such_torch")
    with pytest.raises(ModelError, match="No module named 'no_such_torch'"):
        fleet.count_gpus()
    monkeypatch.setattr(fleet, "_COUNT_GPUS", "print('noise'); print(4)")
    assert fleet.count_gpus() == 4


def test_the_engine_alone_takes_no_device_all() -> None:
    with pytest.raises(InvalidRequest, match="--device is 'all'"):
        read_engine_settings({"model": "demo", "device": "all"})
