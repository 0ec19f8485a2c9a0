"""`shoal bulk` as a command: what is refused, what is printed, how it ends."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from tests.scripted_worker import ScriptedWorker

from shoal.bulk.folder import RunFolder
from shoal.cli.group import shoal


@pytest.fixture
def worker(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedWorker]:
    monkeypatch.setenv("SHOAL_REDIS_URL", redis_url)
    with ScriptedWorker(redis_url) as worker:
        yield worker


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in.txt").write_text("first\n\nsecond\nthird\n")


def bulk(*arguments: str) -> Result:
    return CliRunner().invoke(shoal, ["bulk", *arguments], prog_name="shoal")


@pytest.mark.usefixtures("worker")
def test_a_run_ends_with_examples_and_a_summary() -> None:
    result = bulk("in.txt", "-o", "out.jsonl", "--max-tokens", "4")

    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert result.exit_code == 0, result.output
    assert [row["prompt"] for row in rows] == ["first", "second", "third"]
    assert f"first{rows[0]['text']}\n" in result.stdout
    for words in ("3 of 3", "completion tokens", "12", "tokens/s", "25.0%", "out.jsonl"):
        assert words in result.stdout
    assert result.stderr == ""


@pytest.mark.usefixtures("worker")
def test_json_is_one_object_and_nothing_else() -> None:
    result = bulk("in.txt", "-o", "out.jsonl", "--json")

    record = json.loads(result.stdout)
    assert result.stdout.count("\n") == 1
    assert record["complete"]
    assert (record["rows"], record["failed"], record["completion_tokens"]) == (3, 0, 48)
    assert record["rows_sha256"] == record["file_sha256"]


@pytest.mark.usefixtures("worker")
def test_another_terminal_sees_how_a_run_went() -> None:
    bulk("in.txt", "-o", "out.jsonl")

    result = CliRunner().invoke(shoal, ["status"])
    [run] = json.loads(CliRunner().invoke(shoal, ["status", "--json"]).stdout)["runs"]

    assert "Bulk runs" in result.stdout
    assert "3 of 3" in result.stdout
    assert (run["output"], run["status"], run["rows_done"]) == ("out.jsonl", "complete", 3)
    assert (run["workers"], run["limit_ratio"]) == (1, 1.0)


@pytest.mark.usefixtures("worker")
def test_most_rows_at_the_limit_are_told_early_and_in_the_summary() -> None:
    Path("in.txt").write_text("a prompt\n" * 300)

    result = bulk("in.txt", "-o", "out.jsonl", "--max-tokens", "4")
    meant = bulk("in.txt", "-o", "meant.jsonl", "--max-tokens", "4", "--ignore-eos")

    assert result.stderr.count("100.0% of the completions so far were ended by max_tokens (4)") == 1
    assert "a greater --max-tokens" in result.stdout
    assert "a greater --max-tokens" not in meant.output


@pytest.mark.usefixtures("worker")
def test_a_complete_run_says_so_and_does_nothing() -> None:
    bulk("in.txt", "-o", "out.jsonl")
    written = Path("out.jsonl").stat().st_mtime_ns

    result = bulk("in.txt", "-o", "out.jsonl")

    assert result.exit_code == 0
    assert "out.jsonl is already complete: 3 rows" in result.stderr
    assert Path("out.jsonl").stat().st_mtime_ns == written


@pytest.mark.usefixtures("worker")
def test_a_run_that_died_after_its_last_row_is_ended_without_a_worker() -> None:
    bulk("in.txt", "-o", "out.jsonl")
    manifest = RunFolder(Path("out.jsonl")).manifest
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))

    result = bulk("in.txt", "-o", "out.jsonl", "--json", "--redis", "unix:///nowhere")

    assert result.exit_code == 0
    assert json.loads(result.stdout)["rows_before"] == 3
    assert '"complete": true' in manifest.read_text()


@pytest.mark.usefixtures("worker")
def test_failed_rows_end_a_run_with_3_and_where_they_are() -> None:
    Path("in.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "max_tokns": 1}\n')

    result = bulk("in.jsonl", "-o", "out.jsonl")

    assert result.exit_code == 3
    assert ".out.jsonl.shoal/errors.jsonl says why" in result.stderr
    assert bulk("in.jsonl", "-o", "out.jsonl").exit_code == 3


@pytest.mark.usefixtures("worker")
def test_too_many_failures_stop_a_run_with_3() -> None:
    Path("in.txt").write_text("FAIL\n" * 3 + "fine\n" * 2000)

    result = bulk("in.txt", "-o", "out.jsonl", "--max-failures", "0.1%")

    assert result.exit_code == 3
    assert "stopped: 3 rows failed" in result.stderr


def test_an_empty_input_needs_no_worker() -> None:
    Path("in.txt").write_text("\n \n")

    result = bulk("in.txt", "-o", "out.jsonl")

    assert result.exit_code == 0
    assert "in.txt is empty" in result.stderr
    assert Path("out.jsonl").read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.txt", "-o", "out.jsonl"), "cannot read missing.txt: No such file"),
        (("in.txt", "-o", "nowhere/out.jsonl"), "there is no folder nowhere"),
        (("in.txt", "-o", "out.csv"), "ends in '.csv'; outputs are .jsonl"),
        (("in.parquet", "-o", "out.jsonl"), "ends in '.parquet'; inputs are .txt and .jsonl"),
        (("in.txt", "-o", "out.jsonl", "--max-failures", "x"), "--max-failures is 'x'"),
        (("in.txt", "-o", "out.jsonl", "--max-tokens", "0"), "max_tokens is 0"),
        (("in.txt", "-o", "out.jsonl", "--seed", "-1"), "-1 is not in the range"),
        (("in.txt",), "Missing option '-o'"),
        (("same.jsonl", "-o", "same.jsonl"), "is both input and output"),
        (("-", "-o", "out.jsonl"), "standard input is not read yet"),
    ],
)
def test_wrong_usage_is_one_line_before_anything_is_started(
    arguments: tuple[str, ...], words: str
) -> None:
    Path("same.jsonl").touch()

    result = bulk(*arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert not Path("out.jsonl").exists()


def test_no_worker_and_no_model_says_what_to_do_and_binds_nothing() -> None:
    result = bulk("in.txt", "-o", "out.jsonl")

    assert result.exit_code == 2
    assert "--model demo, the small one that comes with Shoal" in result.stderr
    assert not Path("out.jsonl").exists()


@pytest.mark.usefixtures("worker")
def test_other_parameters_are_refused_with_the_difference() -> None:
    bulk("in.txt", "-o", "out.jsonl")

    result = bulk("in.txt", "-o", "out.jsonl", "--max-tokens", "5")

    assert result.exit_code == 2
    assert "max_tokens 16 (now 5)" in result.stderr
    assert bulk("in.txt", "-o", "out.jsonl", "--max-tokens", "5", "--overwrite").exit_code == 0


@pytest.mark.usefixtures("worker")
def test_an_output_that_another_run_writes_is_4() -> None:
    with RunFolder(Path("out.jsonl")).locked():
        result = bulk("in.txt", "-o", "out.jsonl")

    assert result.exit_code == 4
    assert "is being written by another run" in result.stderr


@pytest.mark.usefixtures("worker")
def test_a_run_out_of_time_is_124_and_goes_on_later(worker: ScriptedWorker) -> None:
    Path("in.txt").write_text("HOLD\nfine\n")

    result = bulk("in.txt", "-o", "out.jsonl", "--timeout", "0.2")
    worker.released.set()

    assert result.exit_code == 124
    assert "0 of 2 rows are written" in result.stderr
    assert bulk("in.txt", "-o", "out.jsonl").exit_code == 0


def test_a_run_whose_kind_of_worker_is_gone_says_so_and_goes_on_mixed(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_REDIS_URL", redis_url)
    Path("in.txt").write_text("HOLD\n" + "fine\n" * 100)
    with ScriptedWorker(redis_url, fingerprint="first") as worker:
        worker.released.set()
        bulk("in.txt", "-o", "out.jsonl")
    manifest = RunFolder(Path("out.jsonl")).manifest
    manifest.write_text(manifest.read_text().replace('"complete": true', '"complete": false'))
    whole = Path("out.jsonl").read_bytes()
    Path("out.jsonl").write_bytes(whole[: len(whole) // 2])

    with ScriptedWorker(redis_url, fingerprint="other"):
        waited = bulk("in.txt", "-o", "out.jsonl", "--timeout", "0.5")
        mixed = bulk("in.txt", "-o", "out.jsonl", "--mixed")

    assert waited.exit_code == 124
    assert (
        "this run is bound to workers of fingerprint first, and no living worker of shoal-bulk has "
        "it (there: other); waiting for one: --mixed lets any worker go on"
    ) in waited.stderr
    assert waited.stderr.count("bound to") == 1
    assert mixed.exit_code == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 101
