"""What a run writes, loaded by the datasets package as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.bulk.runs import write_records, write_run

from shoal.bulk.fields import COLUMNS, Fields
from shoal.bulk.plan import Plan

RECORDS = [{"prompt": f"prompt {i}", "n": 1 + i % 2, "label": i, "half": i / 2} for i in range(9)]
RECORDS += [{"prompt": "FAIL"}, {"prompt": "last", "label": None}]
KEEP = Fields(keep=("label", "half"))


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets  # noqa: PLC0415

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def load(path: str, cache: Path, **options: Any) -> Any:
    from datasets import load_dataset  # noqa: PLC0415

    return load_dataset(path, cache_dir=str(cache / "cache"), **options)["train"]


def plan(tmp_path: Path, output: str) -> Plan:
    source = write_records(tmp_path / "in.jsonl", RECORDS)
    (tmp_path / "out").mkdir(exist_ok=True)
    return Plan(
        source, tmp_path / "out" / output, fields=KEEP, rows_per_shard=4, return_token_ids=True
    )


@pytest.mark.parametrize(
    ("builder", "output"),
    [
        ("json", "out.jsonl"),
        ("json", "out.jsonl.zst"),
        ("parquet", "out.parquet"),
        ("", "corpus"),
    ],
)
def test_an_output_loads_as_it_is(tmp_path: Path, builder: str, output: str) -> None:
    made = plan(tmp_path, output)
    write_run(made)

    if builder:
        found = load(builder, tmp_path, data_files=str(made.output))
    else:
        found = load(str(made.output), tmp_path)

    assert found.column_names == [*COLUMNS, "label", "half", "token_ids"]
    assert len(found) == 14
    assert found[:5]["prompt"] == ["prompt 0", "prompt 1", "prompt 1", "prompt 2", "prompt 3"]
    assert found[-1]["label"] is None
    assert found[4]["half"] == 1.5
    assert found[4]["token_ids"] == [0, 3]


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "corpus"])
def test_side_files_are_no_data_to_who_loads_the_whole_folder(tmp_path: Path, output: str) -> None:
    made = plan(tmp_path, output)
    write_run(made)

    assert len(load(str(tmp_path / "out"), tmp_path)) == 14


def test_batch_answers_load(tmp_path: Path) -> None:
    body = {"model": "m", "prompt": ["a", "b"]}
    records = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
        for i in range(3)
    ]
    made = Plan(write_records(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    write_run(made)

    found = load("json", tmp_path, data_files=str(made.output))

    assert found["custom_id"][:] == ["0", "1", "2"]


def test_an_empty_run_has_all_its_columns(tmp_path: Path) -> None:
    made = Plan(write_records(tmp_path / "in.jsonl", []), tmp_path / "corpus")
    write_run(made)

    (shard,) = (made.output / "data").iterdir()
    assert pq.read_schema(shard).names == list(COLUMNS)
    assert pq.read_metadata(shard).num_rows == 0


def test_columns_have_one_type_whatever_is_in_them(tmp_path: Path) -> None:
    made = plan(tmp_path, "corpus")
    write_run(made)

    schemas = {pq.read_schema(path) for path in (made.output / "data").glob("*.parquet")}

    (schema,) = schemas
    assert schema.field("index").type == schema.field("seed").type == pa.int64()
    assert schema.field("sample").type == schema.field("prompt_tokens").type == pa.int32()
    assert schema.field("completion_tokens").type == pa.int32()
    assert schema.field("label").type == pa.int64()
    assert schema.field("half").type == pa.float64()
    assert schema.field("token_ids").type == pa.list_(pa.int32())


def test_a_folder_has_a_card_that_says_how_it_was_made(tmp_path: Path) -> None:
    made = plan(tmp_path, "corpus")
    manifest = write_run(made)

    names = sorted(path.name for path in (made.output / "data").iterdir())
    card = (made.output / "README.md").read_text()
    assert names == [f"train-{i:05d}-of-00004.parquet" for i in range(4)]
    assert str(manifest.rows_sha256) in card
    assert "14 completions" in card
    assert json.dumps(manifest.parameters.sampling) in card
