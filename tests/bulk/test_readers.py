"""Every kind of input file as rows: columns, templates, compression, and what is broken in it."""

from __future__ import annotations

import csv
import gzip
import io
import json
from datetime import date
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.bulk.runs import write_records, write_run

from shoal.bulk.fields import Fields
from shoal.bulk.folder import RunFolder
from shoal.bulk.plan import Plan
from shoal.bulk.readers import check_input, input_format, read_rows, survey
from shoal.bulk.rows import FailedRow, InputRow, Row, RowDefaults
from shoal.bulk.streams import spool
from shoal.errors import InvalidRequest
from shoal.wire import MAX_PROMPT_BYTES


def read(path: Path, fields: Fields = Fields(), **defaults: Any) -> list[Row]:  # noqa: B008
    kinds = survey(path, fields).kinds
    return list(read_rows(path, RowDefaults(fields=fields, kinds=kinds, **defaults)))


def prompts(rows: list[Row]) -> list[Any]:
    return [row.request.prompt if isinstance(row, InputRow) else None for row in rows]


def reasons(rows: list[Row]) -> list[str]:
    return [row.error.message for row in rows if isinstance(row, FailedRow)]


def write_csv(path: Path, *rows: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_csv_s_columns_are_chosen_by_name_and_everything_in_them_is_text(tmp_path: Path) -> None:
    path = write_csv(
        tmp_path / "in.csv",
        ["q", "doc", "n"],
        ["one,\ntwo", "007", "3"],
        ["", "8", ""],
        ["x", "", "1"],
    )

    rows = read(path, Fields(prompt="q", id="doc", keep=("n",)))

    assert survey(path, Fields(prompt="q")).num_rows == 3
    assert prompts(rows) == ["one,\ntwo", None, "x"]
    assert [row.id for row in rows] == ["007", "8", "2"]
    assert [row.place.line for row in rows] == [2, 4, 5]
    assert rows[0].kept == {"n": "3"}  # type: ignore[union-attr]
    assert reasons(rows) == ["prompt: the prompt is empty; give at least one character or token"]


def test_a_csv_s_broken_rows_are_error_rows_and_the_next_one_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.csv"
    path.write_bytes(
        b'\xef\xbb\xbfprompt,x\nfine,1\nshort\n"quoted"wrong,2\nb\xffd,3\n\n"last ""one""",4\n'
    )

    rows = read(path)

    assert prompts(rows) == ["fine", None, None, None, 'last "one"']
    assert survey(path).num_rows == 5
    assert [row.place.line for row in rows] == [2, 3, 4, 5, 7]
    for words, reason in zip(
        ("1 fields; the header names 2", "CSV", "UTF-8"), reasons(rows), strict=True
    ):
        assert words in reason


def test_a_column_that_is_not_there_is_told_with_those_that_are(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "in.csv", ["q", "a"], ["1", "2"])

    with pytest.raises(InvalidRequest, match=r"no column 'prompt' \(it has: q, a\): name the"):
        survey(path)
    with pytest.raises(InvalidRequest, match="no column 'b'"):
        survey(path, Fields(prompt="q", keep=("b",)))


@pytest.mark.parametrize(("header", "words"), [("", "no header line"), ("a,b,a\n", "named 'a'")])
def test_a_csv_without_a_proper_header_is_refused(tmp_path: Path, header: str, words: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text(header)

    with pytest.raises(InvalidRequest, match=words):
        survey(path)


def test_a_parquet_s_columns_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    table = {
        "prompt": ["a", None, "c"],
        "id": [10, 11, 12],
        "stars": [1, None, 3],
        "score": [0.5, float("nan"), None],
        "good": [True, False, None],
        "day": [date(2024, 1, 2)] * 3,
        "tags": [["x"], [], None],
        "seed": ["of no interest"] * 3,
    }
    pq.write_table(pa.table(table), path)
    keep = ("stars", "score", "good", "day", "tags")

    rows = read(path, Fields(keep=keep))

    assert survey(path, Fields(keep=keep)).kinds == {
        "stars": "int64",
        "score": "double",
        "good": "bool",
        "day": "string",
        "tags": "string",
    }
    assert prompts(rows) == ["a", None, "c"]
    assert [row.id for row in rows] == ["10", "11", "12"]
    assert rows[0].kept == {  # type: ignore[union-attr]
        "stars": 1,
        "score": 0.5,
        "good": True,
        "day": '"2024-01-02"',
        "tags": '["x"]',
    }
    assert reasons(rows) == ["prompt is missing"]


def test_a_parquet_of_token_ids_is_read(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    pq.write_table(pa.table({"tokens": [[1, 2], [3]]}), path)

    assert prompts(read(path, Fields(prompt="tokens"))) == [[1, 2], [3]]


def test_what_is_no_parquet_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "in.parquet"
    path.write_text("prompt\n")

    with pytest.raises(InvalidRequest, match="not readable as Parquet"):
        survey(path)


def test_a_json_line_s_other_fields_are_data_where_the_prompt_is_chosen(tmp_path: Path) -> None:
    records = [
        {"question": "a", "max_tokens": "many", "stars": 1, "doc": 5},
        {"question": "b", "stars": 2.5, "extra": {"x": 1}},
        {"question": None},
        {"stars": 3},
    ]
    path = write_records(tmp_path / "in.jsonl", records)

    fields = Fields(template="Q: {question} {{}}", id="doc", keep=("stars", "extra"))
    rows = read(path, fields)

    assert survey(path, fields).kinds == {"stars": "double", "extra": "string"}
    assert prompts(rows) == ["Q: a {}", "Q: b {}", None, None]
    assert [row.id for row in rows] == ["5", "1", "2", "3"]
    assert rows[1].kept == {"stars": 2.5, "extra": '{"x": 1}'}  # type: ignore[union-attr]
    assert reasons(rows) == ["the template's field 'question' is missing or null"] * 2


def test_a_kept_field_is_no_sampling_field(tmp_path: Path) -> None:
    path = write_records(tmp_path / "in.jsonl", [{"prompt": "a", "label": "x", "max_tokens": 3}])

    (row,) = read(path, Fields(keep=("label",)))

    assert isinstance(row, InputRow)
    assert row.kept == {"label": "x"}
    assert row.request.sampling.max_tokens == 3


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (Fields(prompt="a", template="{b}"), "not both"),
        (Fields(template="no field"), "name a field in it"),
        (Fields(template="{a.b}"), "no plain field"),
        (Fields(template="{a!r}"), "no plain field"),
        (Fields(template="{}"), "no plain field"),
        (Fields(template="{"), "braces"),
        (Fields(keep=("text",)), "every row has a column of that name"),
        (Fields(keep=("a", "a")), "twice"),
    ],
)
def test_choices_that_cannot_be_followed_are_refused(fields: Fields, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words):
        fields.check()


def test_text_has_no_columns_but_takes_a_template(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("one\ntwo\n")

    assert prompts(read(path, Fields(template="Q: {prompt}"))) == ["Q: one", "Q: two"]
    for fields in (Fields(keep=("a",)), Fields(template="{question}"), Fields(id="a")):
        with pytest.raises(InvalidRequest, match=r"in\.txt is text"):
            survey(path, fields)


@pytest.mark.parametrize("name", ["in.txt", "in.jsonl", "in.csv"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_a_compressed_file_is_read_as_if_it_were_not(
    tmp_path: Path, name: str, compression: str
) -> None:
    lines = [f'{{"prompt": "line {i}"}}' if name == "in.jsonl" else f"line {i}" for i in range(500)]
    header = ["prompt"] if name == "in.csv" else []
    content = "".join(f"{line}\n" for line in [*header, *lines]).encode()
    path = tmp_path / f"{name}.{compression}"
    half = len(content) // 2  # Of several members or frames, as parallel compressors write them.
    for part in (content[:half], content[half:]):
        with path.open("ab") as file:
            packed = (
                gzip.compress(part)
                if compression == "gz"
                else pa.compress(part, "zstd").to_pybytes()
            )
            file.write(packed)

    assert survey(path).num_rows == 500
    assert prompts(read(path)) == [f"line {i}" for i in range(500)]


def test_a_compressed_file_that_breaks_off_is_no_input(tmp_path: Path) -> None:
    path = tmp_path / "in.txt.gz"
    path.write_bytes(gzip.compress(b"line\n" * 10_000)[:-20])

    with pytest.raises(InvalidRequest, match="cannot be decompressed"):
        survey(path)


def test_inputs_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name in ("in.json", "in.parquet.gz", "in"):
        (tmp_path / name).touch()
        with pytest.raises(InvalidRequest, match=r"inputs are \.txt"):
            check_input(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "is_table", "found"),
    [
        (b'{"prompt": "a"}\n', False, ".jsonl"),
        (b"a prompt\n", False, ".txt"),
        (b"question,label\n", True, ".csv"),
        (gzip.compress(b"a prompt\n"), False, ".txt.gz"),
        (b"", False, ".txt"),
    ],
)
def test_standard_input_is_kept_as_what_it_is(
    tmp_path: Path, content: bytes, is_table: bool, found: str
) -> None:
    path = spool(tmp_path, is_table=is_table, stream=io.BytesIO(content))

    assert path.name == f"input-{sha256(content).hexdigest()[:16]}{found}"
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]


def test_standard_input_that_brings_nothing_leaves_what_was_kept(tmp_path: Path) -> None:
    kept = spool(tmp_path, is_table=False, stream=io.BytesIO(b"a prompt\n"))

    assert spool(tmp_path, is_table=False, stream=io.BytesIO(b"")) == kept
    assert kept.read_bytes() == b"a prompt\n"
    assert list(tmp_path.iterdir()) == [kept]


def test_a_prompt_too_long_to_be_sent_is_cut_skipped_or_an_error(tmp_path: Path) -> None:
    path = tmp_path / "in.txt"
    path.write_text("é" * MAX_PROMPT_BYTES + "\n")

    (error,) = read(path)
    (skipped,) = read(path, skip_long=True)
    (cut,) = read(path, on_long="truncate-left")

    assert isinstance(error, FailedRow)
    assert not error.is_skipped
    assert isinstance(skipped, FailedRow)
    assert skipped.is_skipped
    assert isinstance(cut, InputRow)
    assert len(str(cut.request.prompt).encode()) == MAX_PROMPT_BYTES


@pytest.mark.parametrize("name", ["in.csv", "in.parquet", "in.jsonl"])
def test_the_errors_of_any_input_are_an_input_of_the_same_choices(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    if name == "in.csv":
        write_csv(path, ["q", "doc", "n"], ["FAIL", "d1", "3"], ["fine", "d2", "4"])
    elif name == "in.parquet":
        pq.write_table(
            pa.table({"q": ["FAIL", "fine"], "doc": ["d1", "d2"], "n": ["3", "4"]}), path
        )
    else:
        write_records(
            path, [{"q": "FAIL", "doc": "d1", "n": "3"}, {"q": "fine", "doc": "d2", "n": "4"}]
        )
    fields = Fields(prompt="q", id="doc", keep=("n",))
    plan = Plan(path, tmp_path / "out.jsonl", fields=fields)
    write_run(plan)
    errors = RunFolder(plan.output).errors
    mended = tmp_path / "mended.jsonl"
    mended.write_text(errors.read_text().replace("FAIL", "mended"))

    write_run(Plan(mended, tmp_path / "second.jsonl", fields=fields))

    (row,) = [json.loads(line) for line in (tmp_path / "second.jsonl").read_text().splitlines()]
    assert (row["index"], row["id"], row["prompt"], row["n"]) == (0, "d1", "mended", "3")


def test_batch_lines_are_known_by_the_first_line(tmp_path: Path) -> None:
    batch = write_records(tmp_path / "a.jsonl", [{"custom_id": "1", "body": {}}])
    own = write_records(tmp_path / "b.jsonl", [{"prompt": "a"}, {"custom_id": "1", "body": {}}])

    assert input_format(batch) == "openai-batch"
    assert input_format(own) == "jsonl"
    with pytest.raises(InvalidRequest, match="holds OpenAI batch lines"):
        survey(batch, Fields(prompt="a"))
