"""`shoal verify`: the same rows, changed rows, whatever the output's format, and what it needs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from click.testing import CliRunner, Result
from tests.scripted_worker import ScriptedWorker

from shoal.cli.group import shoal


@pytest.fixture(autouse=True)
def _in_own_folder(tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_REDIS_URL", redis_url)


@pytest.fixture
def worker(redis_url: str) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_url) as worker:
        worker.released.set()
        yield worker


def run(*arguments: str) -> Result:
    return CliRunner().invoke(shoal, arguments, prog_name="shoal")


def verified(*arguments: str) -> tuple[int, dict[str, Any]]:
    result = run("verify", *arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def written(output: str = "out.jsonl", *options: str) -> None:
    """A run of rows of which some have sampling fields of their own, and two fail."""
    records = [{"prompt": f"prompt number {i}", "id": f"r{i}"} for i in range(30)]
    records[4] |= {"n": 3, "max_tokens": 2}  # type: ignore[dict-item]
    records[5] |= {"prompt": "FAIL"}
    records[7] |= {"seed": 1}  # type: ignore[dict-item]
    lines = [json.dumps(record) for record in records]
    lines[9] = "{broken"
    Path("in.jsonl").write_text("\n".join(lines))
    assert run("bulk", "in.jsonl", "-o", output, *options).exit_code == 3


@pytest.mark.usefixtures("worker")
@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.zst", "out.parquet", "out"])
def test_what_a_run_wrote_is_made_again_as_it_is(output: str, redis_url: str) -> None:
    written(output, "--max-tokens", "4")

    code, found = verified(output, "--rows", "all")

    assert code == 0
    assert (found["checked"], found["differing"], found["failed"]) == (28, 0, 0)
    assert found["file_is_as_written"]
    with redis.Redis.from_url(redis_url) as client:
        assert client.keys("rq:*bulk-*") == []


@pytest.mark.usefixtures("worker")
def test_a_sample_is_of_the_rows_asked_for() -> None:
    written()

    assert verified("out.jsonl", "--rows", "5")[1]["checked"] == 5
    assert verified("out.jsonl", "--rows", "500")[1]["checked"] == 28


@pytest.mark.usefixtures("worker")
def test_a_changed_text_is_found_with_its_first_differing_character() -> None:
    written()
    text = Path("out.jsonl").read_text()
    Path("out.jsonl").write_text(text.replace(" said 16", " sald 16", 1))

    result = run("verify", "out.jsonl", "--rows", "all")
    code, found = verified("out.jsonl", "--rows", "all")

    assert result.exit_code == code == 3
    assert "28 of 30 rows were made again: 27 are the same, 1 differ" in result.stdout
    assert "character 3" in result.stdout
    assert "out.jsonl has been changed since it was written" in result.stderr
    [difference] = found["differences"]
    assert (difference["id"], difference["at"]) == ("r10", 3)
    assert difference["made"].startswith("id 16")


@pytest.mark.usefixtures("worker")
def test_a_changed_token_is_found_where_the_rows_have_tokens() -> None:
    written("out.jsonl", "--return-token-ids", "--max-tokens", "4")
    text = Path("out.jsonl").read_text()
    Path("out.jsonl").write_text(text.replace("[0,1,2,3]", "[0,1,9,3]", 1))

    code, found = verified("out.jsonl", "--rows", "all")

    assert code == 3
    [difference] = found["differences"]
    assert (difference["what"], difference["at"]) == ("token", 2)
    assert (difference["written"], difference["made"]) == (9, 2)


@pytest.mark.usefixtures("worker")
def test_without_the_input_rows_are_made_again_from_the_output() -> None:
    Path("in.txt").write_text("one\ntwo\nthree\n")
    run("bulk", "in.txt", "-o", "out.parquet", "--max-tokens", "3", "--n", "2")
    Path("in.txt").write_text("other\n")

    result = run("verify", "out.parquet", "--rows", "all")

    assert result.exit_code == 0
    assert "in.txt is not there as it was" in result.stderr
    assert "3 of 3 rows were made again: 3 are the same" in result.stdout


@pytest.mark.usefixtures("worker")
def test_answers_to_batch_lines_are_verified_with_their_input() -> None:
    lines = [
        {
            "custom_id": f"c{i}",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"model": "m", "prompt": ["first", f"second {i}"], "max_tokens": 4, "n": 2},
        }
        for i in range(5)
    ]
    Path("in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("bulk", "in.jsonl", "-o", "out.jsonl").exit_code == 0

    code, found = verified("out.jsonl", "--rows", "all")
    Path("in.jsonl").unlink()
    alone = run("verify", "out.jsonl")

    assert (code, found["checked"], found["differing"]) == (0, 5, 0)
    assert alone.exit_code == 2
    assert "out.jsonl does not tell what its lines asked for" in alone.stderr


@pytest.mark.usefixtures("worker")
def test_rows_that_cannot_be_made_again_are_told_and_end_with_3() -> None:
    Path("in.txt").write_text("one\ntwo\nthree\n")
    run("bulk", "in.txt", "-o", "out.jsonl")
    Path("in.txt").unlink()
    text = Path("out.jsonl").read_text()
    Path("out.jsonl").write_text(text.replace('"two"', '"FAIL"'))

    result = run("verify", "out.jsonl", "--rows", "all")

    assert result.exit_code == 3
    assert "1 rows could not be made again: scripted to fail" in result.stderr
    assert "2 of 3 rows were made again: 2 are the same" in result.stdout


@pytest.mark.usefixtures("worker")
def test_a_model_that_nobody_serves_is_refused_before_anything_is_sent() -> None:
    written()

    result = run("verify", "out.jsonl", "--model", "other")

    assert result.exit_code == 2
    assert "served with m, not with other" in result.stderr


def test_rows_are_bound_to_the_kind_that_made_them_unless_it_is_mixed(redis_url: str) -> None:
    with ScriptedWorker(redis_url, fingerprint="first") as first:
        first.released.set()
        written()
    with ScriptedWorker(redis_url, fingerprint="other") as other:
        other.released.set()
        waited = run("verify", "out.jsonl", "--timeout", "0.5")
        assert other.seen == []
        code, found = verified("out.jsonl", "--rows", "all", "--mixed")

    assert waited.exit_code == 124
    assert "fingerprint first, and no living worker of shoal-bulk has it" in waited.stderr
    assert (code, found["differing"]) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("missing.jsonl",), "there is no missing.jsonl"),
        (("plain.jsonl",), "no bulk run wrote plain.jsonl"),
        (("plain.jsonl", "--rows", "0"), "'0' is neither a number of rows, from 1, nor `all`"),
        (("plain.jsonl", "--rows", "some"), "'some' is neither"),
    ],
)
def test_wrong_usage_is_one_line(arguments: tuple[str, ...], words: str) -> None:
    Path("plain.jsonl").write_text("{}\n")

    result = run("verify", *arguments)

    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
