"""Records as requests or errors, and the seeds and flat rows that they become."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shoal.bulk import streams
from shoal.bulk.fields import COLUMNS
from shoal.bulk.flat import flat_rows
from shoal.bulk.plan import MaxFailures
from shoal.bulk.readers import read_rows, survey
from shoal.bulk.records import row_from_line
from shoal.bulk.rows import FailedRow, InputRow, Place, RowDefaults, error_line
from shoal.bulk.seeds import row_seed
from shoal.errors import InvalidRequest
from shoal.wire import Completion, GenerationResult, Usage

DEFAULTS = RowDefaults({"max_tokens": 4}, seed=0)


def row(record: Any, index: int = 0) -> InputRow | FailedRow:
    text = record if isinstance(record, str) else json.dumps(record)
    return row_from_line(text, Place(index, index + 1), DEFAULTS)


def good(record: Any, index: int = 0) -> InputRow:
    found = row(record, index)
    assert isinstance(found, InputRow), found
    return found


def bad(record: Any) -> FailedRow:
    found = row(record)
    assert isinstance(found, FailedRow), found
    return found


def read(path: Path) -> list[InputRow | FailedRow]:
    return list(read_rows(path, DEFAULTS))


def test_row_seeds_of_run_0_are_splitmix64_s_published_outputs_halved() -> None:
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]

    assert [row_seed(0, index) for index in range(3)] == [output >> 1 for output in published]


def test_row_seeds_fit_63_bits_and_do_not_repeat() -> None:
    seeds = {row_seed(run, index) for run in range(20) for index in range(2_000)}

    assert len(seeds) == 40_000
    assert max(seeds) < 2**63
    assert min(seeds) >= 0


def test_a_record_takes_the_run_s_sampling_and_a_seed_of_its_own() -> None:
    found = good({"prompt": "a"}, index=7)

    assert found.id == "7"
    assert found.request.sampling.max_tokens == 4
    assert found.request.sampling.seed == row_seed(0, 7)
    assert found.request.service_class == "bulk"


def test_a_record_s_own_fields_win() -> None:
    found = good({"prompt": "a", "id": 12, "max_tokens": 9, "seed": 5, "metadata": {"k": 1}})

    assert found.id == "12"
    assert found.request.sampling.max_tokens == 9
    assert found.request.sampling.seed == 5
    assert found.metadata == {"k": 1}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ("{broken", "not valid JSON"),
        ("[1]", "JSON list"),
        ('{"prompt": "a", "metadata": {"x": NaN}}', "NaN"),
        ('{"prompt": "\\ud800"}', "surrogate"),
        ("[" * 100_000, "not valid JSON"),
        ({"id": "x"}, "prompt is missing"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": 3}, "prompt is a int"),
        ({"prompt": "a", "max_tokns": 3}, "did you mean 'max_tokens'"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "a", "metadata": [1]}, "metadata is a list"),
        ({"prompt": "a", "id": 1.5}, "id is 1.5"),
    ],
)
def test_a_broken_record_says_what_is_wrong(record: Any, words: str) -> None:
    assert words in bad(record).error.message


def test_an_error_line_is_an_input_with_the_index_id_and_seed_it_had() -> None:
    failed = row_from_line(
        json.dumps({"prompt": "a", "max_tokens": 0, "id": "x"}), Place(41, 50, 1), DEFAULTS
    )
    assert isinstance(failed, FailedRow)
    line = error_line(failed).decode()

    again = bad(line)
    mended = good(line.replace('"max_tokens": 0', '"max_tokens": 1'))

    assert (again.place.index, again.id, again.place.attempts) == (41, "x", 1)
    assert mended.place.index == 41
    assert mended.request.sampling.seed == row_seed(0, 41)


def test_the_error_line_of_a_malformed_line_stays_malformed() -> None:
    line = error_line(bad("{broken")).decode()

    assert json.loads(line)["input"] == "{broken"
    assert "not valid JSON" in bad(line).error.message


def test_every_column_is_there_for_every_completion() -> None:
    found = good({"prompt": [1, 2], "n": 2, "seed": 3, "metadata": {"é": 1}})
    completions = [
        Completion(index=i, text="t", token_ids=[1] * (i + 1), finish_reason="stop")
        for i in range(2)
    ]
    usage = Usage(prompt_tokens=2, completion_tokens=3)
    result = GenerationResult(id="0", completions=completions, usage=usage, model="m")

    rows = list(flat_rows(found, result))

    assert [tuple(one) for one in rows] == [COLUMNS, COLUMNS]
    assert [one["sample"] for one in rows] == [0, 1]
    assert [one["completion_tokens"] for one in rows] == [1, 2]
    assert rows[0]["prompt"] == "[1, 2]"
    assert rows[0]["metadata"] == '{"é": 1}'


def test_text_lines_are_prompts_as_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbffirst \r\n\n  \nsecond\xff\n {x}\nlast")

    rows = read(path)

    assert survey(path).num_rows == 4
    assert [found.place for found in rows] == [Place(0, 1), Place(1, 4), Place(2, 5), Place(3, 6)]
    assert [r.request.prompt for r in rows if isinstance(r, InputRow)] == ["first ", " {x}", "last"]
    assert isinstance(rows[1], FailedRow)
    assert "byte 0xff at 6" in rows[1].error.message


def test_an_endless_line_is_an_error_and_the_next_line_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MAX_LINE_BYTES", 10)
    path = tmp_path / "p.txt"
    path.write_bytes(b"x" * 35 + b"\nshort\n" + b"y" * 30)

    rows = read(path)

    assert [isinstance(found, FailedRow) for found in rows] == [True, False, True]
    assert [found.place.line for found in rows] == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "allowed", "refused"), [("0", 0, 1), ("3", 3, 4), ("10%", 10, 11), ("0%", 0, 1)]
)
def test_max_failures_is_a_number_or_a_share(text: str, allowed: int, refused: int) -> None:
    limit = MaxFailures.parse(text)

    assert limit.allows(allowed, 100)
    assert not limit.allows(refused, 100)


@pytest.mark.parametrize("text", ["", "-1", "x", "101%", "5%x", "%"])
def test_other_max_failures_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="max-failures"):
        MaxFailures.parse(text)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        ("1e999", "1e999 is too large a number; the limit is 1.8e[+]308"),
        ("-1e999", "-1e999 is too large"),
        ("NaN", "NaN is no JSON number"),
        ("-Infinity", "-Infinity is no JSON number"),
    ],
)
@pytest.mark.parametrize(
    "line",
    [
        '{"prompt": "a", "metadata": {"x": [%s]}}',
        '{"prompt": "a", "unheard_of": %s}',
        '{"index": 3, "id": "3", "line": 4, "input": {"prompt": "a", "m": %s}, "error": {}}',
    ],
)
def test_a_number_that_json_cannot_say_is_refused_and_told_in_json(
    line: str, number: str, words: str
) -> None:
    failed = bad(line % number)

    assert re.search(words, failed.error.message)
    strict = json.loads(error_line(failed), parse_constant=pytest.fail)
    assert strict["input"] == line % number


@pytest.mark.parametrize("levels", [40, 400, 100_000])
@pytest.mark.parametrize("field", ["metadata", "unheard_of"])
def test_a_line_that_nests_too_deeply_is_refused_and_told(field: str, levels: int) -> None:
    nested = '{"a":' * levels + "1" + "}" * levels

    failed = bad(f'{{"prompt": "a", "{field}": {nested}}}')

    assert re.search("nests deeper than 34 levels|not valid JSON", failed.error.message)
    assert json.loads(error_line(failed))["error"]["code"] == "invalid_request"


def test_metadata_of_as_many_levels_as_a_request_may_have_is_kept() -> None:
    metadata: Any = {}
    for _ in range(31):
        metadata = {"a": metadata}

    assert good({"prompt": "a", "metadata": metadata}).metadata == metadata
