"""`shoal bulk` as a command: what is refused, what is printed, how it ends."""

from __future__ import annotations

import errno
import json
import os
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
        (("in.json", "-o", "out.jsonl"), "ends in '.json'; inputs are .txt, .jsonl, .csv"),
        (("in.parquet", "-o", "out.jsonl"), "cannot read in.parquet: No such file"),
        (("in.txt", "-o", "out.jsonl", "--template", "x"), "--template is 'x'; name a field"),
        (("in.txt", "-o", "out.jsonl", "--keep-columns", "a"), "in.txt is text and has no columns"),
        (("in.txt", "-o", "taken.jsonl"), "taken.jsonl is a folder already"),
        (("in.txt", "-o", "theirs"), "theirs exists and no bulk run wrote it"),
        (("in.txt", "-o", "out.jsonl", "--max-failures", "x"), "--max-failures is 'x'"),
        (("in.txt", "-o", "out.jsonl", "--max-tokens", "0"), "max_tokens is 0"),
        (("in.txt", "-o", "out.jsonl", "--seed", "-1"), "-1 is not in the range"),
        (("in.txt",), "Missing option '-o'"),
        (("same.jsonl", "-o", "same.jsonl"), "is both input and output"),
    ],
)
def test_wrong_usage_is_one_line_before_anything_is_started(
    arguments: tuple[str, ...], words: str
) -> None:
    Path("same.jsonl").touch()
    Path("taken.jsonl").mkdir()
    Path("theirs").mkdir()
    Path("theirs/notes.txt").touch()

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


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("output", ["out.jsonl.zst", "out.parquet", "corpus"])
def test_every_output_has_the_same_rows_and_its_own_digest(output: str) -> None:
    plain = json.loads(bulk("in.txt", "-o", "plain.jsonl", "--json").stdout)

    made = json.loads(bulk("in.txt", "-o", output, "--json").stdout)
    again = bulk("in.txt", "-o", output)

    assert made["rows_sha256"] == plain["rows_sha256"]
    assert made["file_sha256"] not in {None, plain["file_sha256"]}
    assert "is already complete" in again.stderr


@pytest.mark.usefixtures("worker")
def test_standard_input_is_read_as_a_file_would_be() -> None:
    command = ["bulk", "-", "-o", "out.jsonl", "--prompt-column", "q", "--keep-columns", "n"]

    result = CliRunner().invoke(shoal, command, prog_name="shoal", input="q,n\na,1\nb,2\n")

    rows = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    assert result.exit_code == 0, result.output
    assert [(row["prompt"], row["n"]) for row in rows] == [("a", "1"), ("b", "2")]
    other = CliRunner().invoke(shoal, command, prog_name="shoal", input="q,n\na,1\n")
    assert other.exit_code == 2
    assert "another input" in other.stderr
    assert CliRunner().invoke(shoal, command, prog_name="shoal", input="").exit_code == 0


@pytest.mark.usefixtures("worker")
def test_rows_that_are_too_long_can_be_left_out() -> None:
    Path("in.txt").write_text("first\nTOOLONG\n")

    result = bulk("in.txt", "-o", "out.jsonl", "--on-long", "skip")

    (line,) = RunFolder(Path("out.jsonl")).errors.read_text().splitlines()
    assert result.exit_code == 0
    assert "1 row too long and left out, see .out.jsonl.shoal/errors.jsonl" in result.stderr
    assert json.loads(line)["error"]["code"] == "skipped"
    assert bulk("in.txt", "-o", "out.jsonl", "--on-long", "skip").exit_code == 0


def test_a_run_waits_for_room_on_a_full_disk_says_so_and_goes_on(
    worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, refusals = os.pwrite, iter(range(3))

    def write_later(fd: int, content: bytes, offset: int) -> int:
        if next(refusals, None) is not None:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(fd, content, offset)

    monkeypatch.setattr(os, "pwrite", write_later)

    result = bulk("in.txt", "-o", "out.jsonl")

    assert result.exit_code == 0, result.output
    assert "the disk of out.jsonl is full: waiting until there is room" in result.stderr
    assert "there is room again: going on" in result.stderr
    assert len(Path("out.jsonl").read_text().splitlines()) == len(worker.seen) == 3


def test_a_run_stopped_on_a_full_disk_says_how_many_rows_are_safe(
    worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_arguments: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", never)
        result = bulk("in.txt", "-o", "out.jsonl", "--timeout", "1")

    assert result.exit_code == 124
    assert "0 of 3 rows are written" in result.stderr
    assert bulk("in.txt", "-o", "out.jsonl").exit_code == 0
    assert len(Path("out.jsonl").read_text().splitlines()) == 3


@pytest.mark.usefixtures("worker")
def test_a_dry_run_tells_what_a_run_would_be_and_leaves_nothing() -> None:
    Path("in.jsonl").write_text(
        '{"prompt": "abc"}\n{"prompt": "TOOLONG"}\n{"prompt": "b", "max_tokns": 1}\n{bad\n'
    )

    result = bulk("in.jsonl", "-o", "out.jsonl", "--dry-run", "--json", "--max-tokens", "100")
    shown = bulk("in.jsonl", "-o", "out.jsonl", "--dry-run")

    found = json.loads(result.stdout)
    assert result.exit_code == 0
    assert (found["rows"], found["prompts"], found["refused"]) == (4, 1, 3)
    assert (found["prompt_tokens"], found["max_completion_tokens"]) == (3, 100)
    assert found["tokens_are_counted"]
    assert found["max_s"] == 100 / 12.5
    assert [(one["code"], one["line"]) for one in found["refusals"]] == [
        ("prompt_too_long", 2),
        ("invalid_request", 3),
        ("invalid_request", 4),
    ]
    assert found["refusals"][0]["message"] == "the prompt is 99 tokens; 64 fit"
    assert "did you mean 'max_tokens'" in shown.stdout
    assert not list(Path().glob("*out.jsonl*"))


def test_a_dry_run_without_a_worker_says_that_it_reckons(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_REDIS_URL", redis_url)

    result = bulk("in.txt", "-o", "corpus", "--dry-run")
    away = bulk("in.txt", "-o", "corpus", "--dry-run", "--json", "--redis", "unix:///nowhere")

    assert "reckoned from characters" in result.stdout
    assert "unknown: no worker is there" in result.stdout
    assert "no worker can be asked" in away.stderr
    assert not json.loads(away.stdout)["tokens_are_counted"]
