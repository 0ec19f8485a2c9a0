"""`shoal` as real processes: signals, locks, the embedded Redis and workers of a command's own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.conftest import wait_until
from tests.scripted_worker import ScriptedWorker

import shoal
from shoal.bulk.folder import RunFolder
from shoal.client import Client
from shoal.embedded import EmbeddedRedis, running_url
from shoal.status import live_workers

ROOT = Path(__file__).parent.parent
TIMEOUT_S = 30


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    """With a `shoal_worker` that is the scripted worker, found before the real one."""
    package = tmp_path / "fake" / "shoal_worker"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text("from tests.scripted_worker import main\nmain()\n")
    producer = Path(shoal.__file__).parents[1]  # Not whichever one is installed.
    path = os.pathsep.join([str(tmp_path / "fake"), str(ROOT), str(producer)])
    return os.environ | {"PYTHONPATH": path, "SHOAL_HOME": str(tmp_path / "home")}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose embedded Redis is gone afterwards, also if its commands were killed."""
    yield tmp_path / "home"
    with EmbeddedRedis(tmp_path / "home"):
        pass


def start(*arguments: str, environ: dict[str, str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", "from shoal.cli import main; main()", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environ,
        cwd=folder,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    with process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err


def write_prompts(folder: Path, number: int, held: int | None = None) -> None:
    prompts = [f"prompt {i}" + (" HOLD" if i == held else "") for i in range(number)]
    (folder / "in.txt").write_text("\n".join(prompts))


def num_rows(folder: Path) -> int:
    path = folder / "out.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_signal_ends_a_run_with_its_state_saved(
    redis_url: str, tmp_path: Path, environ: dict[str, str], signum: int, code: int
) -> None:
    write_prompts(tmp_path, 100, held=70)
    with ScriptedWorker(redis_url) as worker:
        arguments = ("bulk", "in.txt", "-o", "out.jsonl", "--redis", redis_url)
        process = start(*arguments, environ=environ, folder=tmp_path)
        # The manifest is saved after the rows that it counts.
        manifest = RunFolder(tmp_path / "out.jsonl").manifest
        wait_until(lambda: manifest.exists() and worker.seen, "the run is under way")
        process.send_signal(signum)
        first = ended(process)
        worker.released.set()
        second = ended(start(*arguments, environ=environ, folder=tmp_path))

    with Client(redis_url) as client:
        left = client.redis.keys("rq:job:*")
    assert first[0] == code, first
    assert first[2].startswith("shoal: interrupted: ")
    assert first[2].count("\n") == 1
    assert second[0] == 0, second
    assert num_rows(tmp_path) == 100
    assert left == []


def test_a_killed_run_leaves_no_lock_and_goes_on(
    redis_url: str, tmp_path: Path, environ: dict[str, str]
) -> None:
    write_prompts(tmp_path, 100, held=70)
    with ScriptedWorker(redis_url) as worker:
        arguments = ("bulk", "in.txt", "-o", "out.jsonl", "--redis", redis_url)
        process = start(*arguments, environ=environ, folder=tmp_path)
        manifest = RunFolder(tmp_path / "out.jsonl").manifest
        wait_until(lambda: manifest.exists() and worker.seen, "the run is under way")
        locked = ended(start(*arguments, environ=environ, folder=tmp_path))
        process.kill()
        ended(process)
        worker.released.set()
        second = ended(start(*arguments, environ=environ, folder=tmp_path))

    assert locked[0] == 4
    assert f"(process {process.pid})" in locked[2]
    assert second[0] == 0, second
    assert num_rows(tmp_path) == 100


@pytest.mark.usefixtures("home")
def test_submit_starts_a_worker_for_itself_and_ends_it(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    arguments = ("submit", "hello", "--seed", "1", "--model", "toy", "--json")
    code, out, err = ended(start(*arguments, environ=environ, folder=tmp_path))

    assert code == 0, err
    assert json.loads(out)["completions"][0]["text"] == " said 5 1 0"
    assert err.splitlines() == [
        "shoal: using the embedded Redis of this user",
        "shoal: starting a worker for model toy",
    ]
    assert running_url(tmp_path / "home") is None


@pytest.mark.usefixtures("home")
def test_bulk_starts_as_many_workers_as_it_is_told(tmp_path: Path, environ: dict[str, str]) -> None:
    write_prompts(tmp_path, 5)
    arguments = ("bulk", "in.txt", "-o", "out.jsonl", "--model", "toy", "--local-workers", "2")
    code, out, err = ended(start(*arguments, environ=environ, folder=tmp_path))

    assert code == 0, err
    assert "starting 2 workers for model toy" in err
    assert "5 of 5" in out
    assert num_rows(tmp_path) == 5


@pytest.mark.usefixtures("home")
def test_a_worker_that_cannot_start_is_one_line_with_its_reason(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    arguments = ("submit", "hello", "--model", "broken")
    code, out, err = ended(start(*arguments, environ=environ, folder=tmp_path))

    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == (
        "shoal: the worker for model broken ended before it was ready (exit code 1): "
        "model 'broken' does not exist"
    )


@pytest.mark.usefixtures("home")
def test_leaving_a_job_that_nobody_would_do_is_refused(
    tmp_path: Path, environ: dict[str, str]
) -> None:
    arguments = ("submit", "hello", "--no-wait", "--model", "toy")
    code, _out, err = ended(start(*arguments, environ=environ, folder=tmp_path))

    assert code == 2
    assert "nobody would do it" in err


def test_an_interrupted_submit_takes_its_request_back(
    redis_url: str, tmp_path: Path, environ: dict[str, str]
) -> None:
    with ScriptedWorker(redis_url) as worker, Client(redis_url) as client:
        process = start("submit", "HOLD", "--redis", redis_url, environ=environ, folder=tmp_path)
        wait_until(lambda: worker.seen, "the request is under way")
        process.send_signal(signal.SIGTERM)
        code, _out, err = ended(process)
        num_cancelled = client.redis.zcard("rq:canceled:shoal-default")

    assert code == 143
    assert err == "shoal: interrupted\n"
    assert num_cancelled == 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child of its parent's end")
def test_a_killed_command_takes_its_worker_with_it(
    tmp_path: Path, home: Path, environ: dict[str, str]
) -> None:
    environ["SCRIPTED_HOLD"] = "1"
    process = start("submit", "HOLD", "--model", "toy", environ=environ, folder=tmp_path)
    wait_until(lambda: running_url(home), "the embedded Redis runs")
    with EmbeddedRedis(home) as server, Client(server.url) as client:
        wait_until(lambda: live_workers(client.redis), "its worker runs")
        process.kill()
        ended(process)
        wait_until(lambda: not client.redis.smembers("rq:workers"), "its worker has left")


def test_a_secret_address_and_json_logs_do_not_confuse_a_worker_of_one_s_own(
    redis_url: str, tmp_path: Path, environ: dict[str, str]
) -> None:
    (tmp_path / "redis_url").write_text(redis_url)
    write_prompts(tmp_path, 2)
    environ |= {"SHOAL_REDIS_URL_FILE": str(tmp_path / "redis_url"), "SHOAL_LOG_FORMAT": "json"}
    arguments = ("bulk", "in.txt", "-o", "out.jsonl", "--model", "toy", "--local-workers", "1")
    code, _out, err = ended(start(*arguments, environ=environ, folder=tmp_path))

    assert code == 0, err
    assert json.loads(err.splitlines()[0])["message"] == "starting a worker for model toy"
    assert num_rows(tmp_path) == 2
