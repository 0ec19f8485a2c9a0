"""Shoal beside other engines: who runs, who must not, and what is made of their figures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.tiny_models import make_tiny_model_folder

from shoal.errors import InvalidRequest
from shoal.wire import GenerationRequest, SamplingParams
from shoal_worker.bench import peers_command
from shoal_worker.bench.cli import bench
from shoal_worker.bench.peers import processes
from shoal_worker.bench.peers.adapters import _batches
from shoal_worker.bench.peers.engines import ENGINES
from shoal_worker.bench.peers.processes import PeerFailed, PeerProcess, Place, bare_package, places
from shoal_worker.bench.peers.protocol import Setup
from shoal_worker.bench.workloads import Workload

SETUP = Setup("folder", "cpu", "float32", threads=1)
# An interpreter that has vLLM alone, or so it says; what it makes is in its model's name.
FAKE_PYTHON = """#!{python}
import json, os, sys
if len(sys.argv) == 3:
    print(json.dumps({{"vllm": "9.9"}}))
    sys.exit()
setup = json.loads(sys.argv[4])
assert os.environ["OMP_NUM_THREADS"] == str(setup["threads"])
print(json.dumps({{"load_s": 1.5, "differs": "made up"}}), flush=True)
for line in sys.stdin:
    wanted = json.loads(line)["new_tokens"]
    if setup["model"].endswith("dies"):
        sys.exit("it grew too large")
    if setup["model"].endswith("short"):
        wanted[-1] -= 1
    print(json.dumps({{"duration_s": 2.0, "made": wanted}}), flush=True)
"""


@pytest.fixture
def fake_python(tmp_path: Path) -> str:
    path = tmp_path / "python"
    path.write_text(FAKE_PYTHON.format(python=sys.executable))
    path.chmod(0o755)
    return str(path)


def workload(*new_tokens: int) -> Workload:
    requests = [
        GenerationRequest(prompt=[1, 2], sampling=SamplingParams(max_tokens=number))
        for number in new_tokens
    ]
    return Workload("mine", requests)


def process_of(python: str, model: str) -> PeerProcess:
    setup = Setup(model, "cpu", "float32", threads=3)
    return PeerProcess("vllm", Place(python, "9.9"), setup, Path("nowhere"))


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(bench, ["peers", *arguments], catch_exceptions=False)


def test_a_peer_tells_its_own_time_for_the_whole_workload(fake_python: str) -> None:
    with process_of(fake_python, "model") as process:
        run = process.run(workload(10, 30))

    assert (process.load_s, process.differs) == (1.5, "made up")
    assert run.tokens_per_s == 20.0


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("dies", "ended with exit code 1: it grew too large"),
        ("short", "made 29 tokens for a prompt that asked for 30"),
    ],
)
def test_a_peer_that_does_not_do_its_work_has_failed(
    fake_python: str, model: str, words: str
) -> None:
    with process_of(fake_python, model) as process, pytest.raises(PeerFailed, match=words):
        process.run(workload(10, 30))


def test_a_peer_that_cannot_load_tells_why_in_its_last_line() -> None:
    with bare_package() as package, pytest.raises(PeerFailed, match="No module named 'vllm'"):
        PeerProcess("vllm", Place(sys.executable, "1"), SETUP, package)


def test_the_first_interpreter_that_has_a_peer_runs_it(fake_python: str) -> None:
    with bare_package() as package:
        found = places([sys.executable, fake_python], package)
        again = places([fake_python, sys.executable], package)

    assert found["shoal"].python == found["transformers"].python == sys.executable
    assert found["vllm"] == again["vllm"] == Place(fake_python, "9.9")


@pytest.mark.parametrize(
    ("python", "words"),
    [("/nowhere/python", "cannot be run"), ("/bin/false", "no Python that runs peers: no reason")],
)
def test_an_interpreter_that_is_none_is_refused(python: str, words: str) -> None:
    with bare_package() as package, pytest.raises(InvalidRequest, match=words):
        places([python], package)


def test_another_interpreter_needs_nothing_of_ours() -> None:
    """Isolated from this environment's packages, the child still tells what it has."""
    with bare_package() as package:
        done = subprocess.run(
            [sys.executable, "-S", "-m", processes._CHILD],
            env={"PYTHONPATH": str(package)},
            capture_output=True,
            text=True,
            check=True,
        )

    assert json.loads(done.stdout) == {}


def test_only_our_own_interpreter_keeps_our_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/ours")

    ours = processes._environ(sys.executable, Path("/package"))
    theirs = processes._environ("/usr/bin/other", Path("/package"))

    assert ours["PYTHONPATH"] == os.pathsep.join(["/package", "/ours"])
    assert theirs["PYTHONPATH"] == "/package"


def test_rows_of_a_batch_end_together() -> None:
    prompts, new_tokens = [[1], [1, 2], [1], [1, 2, 3]], [5, 9, 9, 1]

    assert _batches(prompts, new_tokens, rows=2) == [[1, 2], [0, 3]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for the workloads."""
    return make_tiny_model_folder(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512
    )


def test_all_that_is_installed_makes_exactly_what_was_asked_for(
    model: Path, fake_python: str
) -> None:
    result = invoke(
        *("--model", str(model), "--lanes", "bulk=4x512", "--threads", "1", "--json"),
        *("--workload", "W2", "--prompts", "3", "--rounds", "2", "--peer-python", fake_python),
    )

    assert result.exit_code == 0, result.stderr
    report: Any = json.loads(result.stdout)
    assert report["failed"] == {}, "a wrong number of tokens is a failure"
    measured = {one["title"]: one for one in report["measured"]}
    assert list(measured) == [
        "Shoal",
        "transformers generate",
        "transformers generate_batch",
        "vLLM",
    ]
    assert all(len(one["tokens_per_s"]["values"]) == 2 for one in measured.values())
    assert measured["vLLM"]["tokens_per_s"]["median"] == report["new_tokens"] / 2.0
    assert measured["vLLM"]["shoal_ratio"]["values"] == pytest.approx(
        [own / (report["new_tokens"] / 2) for own in measured["Shoal"]["tokens_per_s"]["values"]]
    )
    assert set(report["missing"]) == {
        engine.title for name, engine in ENGINES.items() if name.startswith(("openvino", "ctrans"))
    }


def test_a_table_says_who_failed_and_how_to_install_who_is_missing(
    model: Path, fake_python: str, tmp_path: Path
) -> None:
    failing = tmp_path / "dies"
    failing.symlink_to(model)

    result = invoke(
        *("--model", str(failing), "--lanes", "bulk=4x512", "--threads", "1", "--quick"),
        *(
            "--prompts",
            "2",
            "--peer-python",
            fake_python,
            "--peer",
            "vllm",
            "--peer",
            "ctranslate2",
        ),
    )

    assert "vLLM failed: it ended with exit code 1: it grew too large" in result.stdout
    assert "CTranslate2 is not installed: pip install ctranslate2" in result.stdout
    assert "transformers generate" not in result.stdout
    assert "1.00×" in result.stdout


@pytest.mark.parametrize("converted", ["openvino", "nobody=folder"])
def test_a_converted_model_names_its_peer(converted: str) -> None:
    result = invoke("--model", "demo", "--converted", converted)

    assert result.exit_code == 2
    assert "write PEER=FOLDER with PEER one of" in result.stderr


def test_a_variant_is_shoal_with_some_other_settings() -> None:
    given = {"threads": 2, "lanes": "bulk=4x64"}

    variants = peers_command._variants(given, ["--threads 1 --no-kernels"])

    [(title, settings)] = variants.items()
    assert title == "Shoal --threads 1 --no-kernels"
    assert settings == {"threads": 1, "lanes": "bulk=4x64", "kernels": False}


@pytest.mark.parametrize("model", [("--model", "demo"), ()])
def test_a_variant_is_made_of_the_engine_s_settings(model: tuple[str, ...]) -> None:
    result = invoke(*model, "--variant", "--colour blue")

    assert result.exit_code == 2
    assert "writing" not in result.stderr
    assert "--colour" in result.stderr
