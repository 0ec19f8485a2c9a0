"""What a crash leaves behind, at every byte and every step, and a disk that is full for a while."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.bulk.runs import answer, write_records, write_run, writing

from shoal.bulk import shards as shards_module
from shoal.bulk.folder import RunFolder
from shoal.bulk.opening import open_run
from shoal.bulk.plan import Plan
from shoal.bulk.rows import InputRow
from shoal.bulk.zstd_frames import frames

RECORDS: list[Any] = [
    {"prompt": "one"},
    {"prompt": "two", "n": 3},
    "{broken",
    {"prompt": "FAIL"},
    {"prompt": "ünicode ☃", "metadata": {"k": [1, None]}},
    {"prompt": "six"},
    {"prompt": "last", "id": "the end"},
]
OUTPUTS = ("out.jsonl", "out.jsonl.zst", "out.parquet", "corpus")


def source(tmp_path: Path) -> Path:
    return write_records(tmp_path / "in.jsonl", RECORDS)


def contents(folder: Path) -> dict[str, bytes]:
    """Every data file of an output, and its errors."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != "README.md"]
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in files
        if path.name not in {"manifest.json", "lock", "in.jsonl"}
    }


def test_a_run_goes_on_at_every_byte_of_its_last_row(tmp_path: Path) -> None:
    plan = Plan(source(tmp_path), tmp_path / "out.jsonl")
    digest = write_run(plan).rows_sha256
    whole = plan.output.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1

    for length in range(last, len(whole)):
        plan.output.write_bytes(whole[:length])
        assert [row.id for row in open_run(plan).rows] == ["the end"]
        assert write_run(plan).rows_sha256 == digest
        assert plan.output.read_bytes() == whole


def test_a_run_goes_on_at_every_byte_of_its_last_frame(tmp_path: Path) -> None:
    plan = Plan(source(tmp_path), tmp_path / "out.jsonl.zst")
    digest = write_run(plan).rows_sha256
    whole = plan.output.read_bytes()
    with plan.output.open("rb") as file:
        found = list(frames(file))
    assert len(found) > 2

    for length in range(found[-1].start, len(whole)):
        plan.output.write_bytes(whole[:length])
        assert [row.id for row in open_run(plan).rows] == ["the end"]
        assert write_run(plan).rows_sha256 == digest
        assert plan.output.read_bytes() == whole


@pytest.mark.parametrize("output", ["out.jsonl", "out.jsonl.zst"])
def test_a_torn_error_file_costs_the_rows_behind_it_and_no_more(
    tmp_path: Path, output: str
) -> None:
    plan = Plan(source(tmp_path), tmp_path / output)
    digest = write_run(plan, sync_every=100).rows_sha256
    errors = RunFolder(plan.output).errors
    whole = errors.read_bytes()

    for length in range(0, len(whole), 7):
        errors.write_bytes(whole[:length])

        assert write_run(plan, sync_every=100).rows_sha256 == digest
        assert errors.read_bytes() == whole


@pytest.mark.parametrize("output", ["out.parquet", "corpus"])
@pytest.mark.parametrize("rows_per_shard", [1, 3, 100])
def test_a_run_to_parquet_goes_on_from_every_step_of_its_writing(
    tmp_path: Path, output: str, rows_per_shard: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before and after every rename, removal and sync, whatever is on the disk is copied."""
    plan = Plan(source(tmp_path), tmp_path / "a" / output, rows_per_shard=rows_per_shard)
    plan.output.parent.mkdir()
    copies: list[Path] = []

    def copied(call: Callable[..., Any]) -> Callable[..., Any]:
        def copy_and_call(*arguments: Any, **options: Any) -> Any:
            copies.append(tmp_path / f"copy-{len(copies)}")
            shutil.copytree(plan.output.parent, copies[-1])
            return call(*arguments, **options)

        return copy_and_call

    with monkeypatch.context() as patched:
        for name in ("replace", "unlink"):
            patched.setattr(Path, name, copied(getattr(Path, name)))
        digest = write_run(plan).rows_sha256
    whole = contents(plan.output.parent)
    assert len(copies) > 6

    for copy in copies:
        again = Plan(plan.source, copy / output, rows_per_shard=rows_per_shard)

        assert write_run(again).rows_sha256 == digest
        assert contents(copy) == whole


@pytest.mark.parametrize("output", ["out.parquet", "corpus"])
def test_a_run_to_parquet_goes_on_at_every_byte_of_its_journal(tmp_path: Path, output: str) -> None:
    plan = Plan(source(tmp_path), tmp_path / "a" / output, rows_per_shard=4)
    plan.output.parent.mkdir()
    halves: list[Path] = []

    def keep(rows: int) -> None:
        halves.append(tmp_path / f"half-{rows}")
        shutil.copytree(plan.output.parent, halves[-1])

    digest = write_run(plan, after_sync=keep).rows_sha256
    whole = contents(plan.output.parent)
    (journal,) = (halves[-1] / f".{output}.shoal" / "shards").glob("*.jsonl")
    stored = journal.read_bytes()
    assert stored

    for length in range(0, len(stored), 23):
        copy = tmp_path / f"torn-{length}"
        shutil.copytree(halves[-1], copy)
        (copy / journal.relative_to(halves[-1])).write_bytes(stored[:length])

        assert write_run(Plan(plan.source, copy / output, rows_per_shard=4)).rows_sha256 == digest
        assert contents(copy) == whole


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_complete_output_that_lost_its_errors_is_made_whole(tmp_path: Path, output: str) -> None:
    plan = Plan(source(tmp_path), tmp_path / output, rows_per_shard=2)
    digest = write_run(plan).rows_sha256
    errors = RunFolder(plan.output).errors
    whole = errors.read_bytes()
    errors.unlink()

    assert write_run(plan).rows_sha256 == digest
    assert errors.read_bytes() == whole


def test_all_outputs_hold_the_same_rows(tmp_path: Path) -> None:
    plans = [Plan(source(tmp_path), tmp_path / output, rows_per_shard=2) for output in OUTPUTS]

    assert len({write_run(plan).rows_sha256 for plan in plans}) == 1


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_run_begun_anew_leaves_nothing_of_the_old_one(tmp_path: Path, output: str) -> None:
    plan = Plan(source(tmp_path), tmp_path / "a" / output, rows_per_shard=1)
    plan.output.parent.mkdir()
    write_run(plan)
    fewer = write_records(tmp_path / "fewer.jsonl", RECORDS[:2])
    options: dict[str, Any] = {"rows_per_shard": 3}
    expected = Plan(fewer, tmp_path / "b" / output, **options)
    expected.output.parent.mkdir()
    write_run(expected)

    write_run(Plan(fewer, plan.output, overwrite=True, **options))

    assert contents(plan.output.parent) == contents(expected.output.parent)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_full_disk_loses_nothing_and_the_next_sync_goes_on(
    tmp_path: Path, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan(source(tmp_path), tmp_path / output, rows_per_shard=2)
    digest = write_run(plan).rows_sha256
    with writing(Plan(plan.source, plan.output, rows_per_shard=2, overwrite=True)) as (
        opened,
        writer,
        manifest,
    ):
        for position, row in enumerate(opened.rows):
            writer.put(position, answer(row) if isinstance(row, InputRow) else row)
        with monkeypatch.context() as patched:
            for room in range(0, 200, 10):
                patched.setattr(os, "pwrite", _disk_with(room))
                with pytest.raises(OSError, match="No space left"):
                    writer.sync()
        with monkeypatch.context() as patched:
            patched.setattr(shards_module, "write_parquet", _no_room)
            if output in {"out.parquet", "corpus"}:
                with pytest.raises(OSError, match="No space left"):
                    writer.finish()
        writer.finish()

    assert manifest.rows_sha256 == digest
    with writing(plan) as (opened, _writer, _manifest):
        assert list(opened.rows) == []


def _disk_with(room: int) -> Callable[..., int]:
    """`os.pwrite` on a disk with so many bytes left."""
    pwrite, left = os.pwrite, [room]

    def write(fd: int, content: bytes, offset: int) -> int:
        if not left[0]:
            _no_room()
        written = pwrite(fd, content[: left[0]], offset)
        left[0] -= written
        return written

    return write


def _no_room(*_arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")
