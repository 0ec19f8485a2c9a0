"""`shoal bench` on a tiny model: what a person types, and what they read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tests.tiny_models import make_tiny_model_folder

from shoal.errors import InvalidRequest
from shoal_worker.bench import ceilings
from shoal_worker.bench.cli import COMMANDS, bench

SMALL = ("--lanes", "bulk=4x256", "--threads", "1", "--prompts", "6", "--calls", "2")

pytestmark = pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with room for the workloads."""
    return make_tiny_model_folder(
        tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=256
    )


@pytest.fixture(autouse=True)
def _small_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "_BYTES", {"cpu": 2**16})
    monkeypatch.setattr(ceilings, "_WIDTH", {"cpu": 64})


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(bench, arguments, catch_exceptions=False)


def report_of(*arguments: str) -> Any:
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("arguments", [[], *([name] for name in COMMANDS)])
def test_help_loads_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from click.testing import CliRunner; from shoal_worker.bench.cli import bench;"
        f"print(CliRunner().invoke(bench, {[*arguments, '--help']!r}).output);"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60
    )

    assert done.returncode == 0, done.stderr
    assert "Usage:" in done.stdout


def test_engine_and_queue_run_the_same_workload_in_turns(model: Path) -> None:
    report = report_of("throughput", "--model", str(model), *SMALL, "--rounds", "2")

    assert (report["prompts"], report["new_tokens"]) == (6, 6 * 64)
    speeds = report["tokens_per_s"]
    assert list(speeds) == ["engine alone", "through the queue"]
    assert [len(one["values"]) for one in speeds.values()] == [2, 2]
    pairs = zip(*(one["values"] for one in speeds.values()), strict=True)
    assert report["queue_ratio"]["values"] == pytest.approx([queue / own for own, queue in pairs])


def test_a_report_accounts_for_steps_time_and_padding(model: Path) -> None:
    report = report_of("throughput", "--model", str(model), *SMALL, "--rounds", "1", "--no-queue")

    decode, prefill = report["phases"]["decode"], report["phases"]["prefill"]
    # A prefill makes the first token of each sequence.
    assert (prefill["rows"], prefill["tokens"]) == (6, report["prompt_tokens"])
    assert decode["tokens"] == 6 * 63
    assert decode["padding_ratio"] == pytest.approx(1 - 6 * 63 / (4 * decode["steps"]))
    assert 0 < decode["seconds"] + prefill["seconds"] < report["duration_s"]
    assert report["queue_ratio"] is None
    assert report["roofline_ratio"] == pytest.approx(
        report["tokens_per_s"]["engine alone"]["median"] / report["bound_tokens_per_s"]
    )


def test_a_table_says_where_how_fast_and_with_what_share(model: Path) -> None:
    result = invoke("throughput", "--model", str(model), *SMALL, "--rounds", "1", "--no-queue")

    for words in ("engine alone", "of the roofline", "GB/s", "prefill", "attention", "torch"):
        assert words in result.stdout
    assert "round 1 of 1: engine alone" in result.stderr
    assert len(result.stdout.splitlines()) < 50


def test_a_file_of_prompts_is_a_workload(model: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "mine.txt"
    prompts.write_text("One lane, eight slots.\nThe queue holds the prompts.\n")

    report = report_of(
        *("throughput", "--model", str(model), *SMALL, "--rounds", "1", "--no-queue"),
        *("--workload", str(prompts), "--max-tokens", "7"),
    )

    assert (report["workload"], report["prompts"], report["new_tokens"]) == ("mine.txt", 2, 14)


def test_a_workload_that_the_model_cannot_hold_is_refused(model: Path) -> None:
    with pytest.raises(InvalidRequest, match="the lanes take 128"):
        invoke("throughput", "--model", str(model), "--lanes", "bulk=2x128", "--threads", "1")


def test_a_shape_and_a_model_are_too_much() -> None:
    result = invoke("throughput", "--model", "demo", "--shape", "gpt2")

    assert result.exit_code == 2
    assert "--shape gpt2 is a model by itself" in result.stderr
