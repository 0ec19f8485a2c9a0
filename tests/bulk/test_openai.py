"""OpenAI's batch lines, made and parsed with the types of its own package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming as Chat
from openai.types.completion_create_params import CompletionCreateParamsNonStreaming as Prompted
from tests.bulk.runs import write_records, write_run, writing

from shoal import wire
from shoal.bulk.folder import RunFolder
from shoal.bulk.openai_answers import response_line
from shoal.bulk.openai_batch import rows_from_line
from shoal.bulk.plan import Plan
from shoal.bulk.rows import FailedRow, InputRow, Place, Row, RowDefaults
from shoal.bulk.seeds import row_seed

DEFAULTS = RowDefaults({"max_tokens": 4}, seed=0)
MESSAGES: Any = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hi"}]},
]


def line(body: Any, custom_id: str = "a", url: str = "/v1/completions") -> dict[str, Any]:
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat(body: Any, custom_id: str = "c") -> dict[str, Any]:
    return line({"model": "m", "messages": MESSAGES, **body}, custom_id, "/v1/chat/completions")


def rows(record: dict[str, Any], index: int = 0) -> list[Row]:
    return rows_from_line(json.dumps(record), Place(index, index + 1), DEFAULTS)


def good(record: dict[str, Any], index: int = 0) -> InputRow:
    (row,) = rows(record, index)
    assert isinstance(row, InputRow), row
    return row


def refusal(record: dict[str, Any]) -> str:
    (row,) = rows(record)
    assert isinstance(row, FailedRow), row
    return row.error.message


def test_a_file_made_with_openai_s_types_is_answered_with_lines_that_they_parse(
    tmp_path: Path,
) -> None:
    one = Prompted(model="m", prompt="Once", max_tokens=3, n=2, logprobs=None, user="u", best_of=2)
    many = Prompted(model="m", prompt=["a", "b"], temperature=0, stop=["x"], echo=False)
    ids = Prompted(model="m", prompt=[[1, 2], [3]], seed=5, suffix=None, stream=False)
    talk = Chat(model="m", messages=MESSAGES, max_completion_tokens=3, top_p=0.5, n=2)
    records = [line(one, "1"), line(many, "2"), line(ids, "3"), chat(talk, "4")]
    plan = Plan(write_records(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")

    write_run(plan)

    answers = [json.loads(text) for text in plan.output.read_text().splitlines()]
    assert [answer["custom_id"] for answer in answers] == ["1", "2", "3", "4"]
    assert [set(answer) for answer in answers] == [{"id", "custom_id", "response", "error"}] * 4
    for answer in answers:
        assert answer["error"] is None
        assert answer["response"]["status_code"] == 200
    bodies = [answer["response"]["body"] for answer in answers]
    for body, num_choices in zip(bodies[:3], (2, 2, 2), strict=True):
        completion = Completion.model_validate(body, strict=True)
        assert [choice.index for choice in completion.choices] == list(range(num_choices))
        assert completion.choices[0].finish_reason == "length"
        assert completion.usage is not None
        assert completion.usage.completion_tokens == 4
    talked = ChatCompletion.model_validate(bodies[3], strict=True)
    assert talked.choices[1].message.role == "assistant"
    assert talked.choices[1].message.content == " é3.1"
    assert talked.system_fingerprint == "f"


def test_logprobs_are_answered_as_openai_has_them() -> None:
    logprobs = wire.Logprobs(
        tokens=["a", "é"], token_logprobs=[-1.0, -2.0], top_logprobs=[{"a": -1.0}, {"b": -0.5}]
    )
    completion = wire.Completion(
        index=0, text="aé", token_ids=[1, 2], finish_reason="stop", logprobs=logprobs
    )
    usage = wire.Usage(prompt_tokens=1, completion_tokens=2)
    result = wire.GenerationResult(id="a", completions=[completion], usage=usage, model="m")

    def body(record: dict[str, Any]) -> Any:
        answered = response_line([(good(record), result)], with_token_ids=True)
        return json.loads(answered)["response"]["body"]

    completed = Completion.model_validate(body(line({"prompt": "x", "logprobs": 1})), strict=True)
    talked = ChatCompletion.model_validate(
        body(chat({"logprobs": True, "top_logprobs": 1})), strict=True
    )

    found = completed.choices[0].logprobs
    assert found is not None
    assert (found.tokens, found.text_offset) == (["a", "é"], [0, 1])
    assert talked.choices[0].logprobs is not None
    assert talked.choices[0].logprobs.content is not None
    assert talked.choices[0].logprobs.content[1].bytes == [0xC3, 0xA9]
    assert talked.choices[0].logprobs.content[1].top_logprobs[0].token == "b"
    assert completed.choices[0].model_extra == {
        "token_ids": [1, 2],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }


def test_each_prompt_of_a_line_is_a_row_with_a_seed_of_its_own() -> None:
    found = rows(line({"model": "m", "prompt": ["a", "b"]}), index=7)

    assert [row.place.part for row in found] == [0, 1]
    assert {row.place.num_parts for row in found} == {2}
    assert {row.place.index for row in found} == {7}
    seeds = [row.request.sampling.seed for row in found if isinstance(row, InputRow)]
    assert seeds == [row_seed(0, 7), row_seed(row_seed(0, 7), 1)]


def test_a_conversation_goes_over_the_wire_as_messages() -> None:
    request = good(chat({"max_completion_tokens": 2, "tool_choice": "none"})).request

    assert [message.model_dump(exclude_none=True) for message in request.messages] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say hi"},
    ]
    assert request.prompt == ""
    assert (request.sampling.max_tokens, request.model) == (2, "m")


def test_the_model_of_a_line_can_be_ignored() -> None:
    text = json.dumps(line({"model": "other", "prompt": "a"}))

    (row,) = rows_from_line(text, Place(0, 1), RowDefaults(ignore_model=True))

    assert isinstance(row, InputRow)
    assert row.request.model is None


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"prompt": "a", "echo": True}, "echo is true; only false is accepted"),
        ({"prompt": "a", "best_of": 3}, "best_of is 3; only 1 is accepted"),
        ({"prompt": "a", "best_of": True}, "best_of is true"),
        ({"prompt": "a", "stream": True}, "stream is true"),
        ({"prompt": "a", "suffix": "end"}, 'suffix is "end"'),
        ({"prompt": "a", "max_tokns": 1}, "did you mean 'max_tokens'"),
        ({"prompt": "a", "max_tokens": "1"}, "max_tokens is '1'"),
        ({"prompt": []}, "the prompt is empty"),
        ({"prompt": [[]]}, "the prompt is empty"),
        ({"prompt": ["a", 1]}, "prompt holds a int"),
        ({"prompt": ["a"] * 2049}, "2049 prompts; the limit is 2048"),
        ({}, "prompt is missing"),
        ([], "body is a list"),
        ({"prompt": "a", "messages": MESSAGES}, "unknown field 'messages'"),
    ],
)
def test_what_is_not_ours_to_follow_is_refused_by_name(body: Any, words: str) -> None:
    assert words in refusal(line(body))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": []}, "messages is missing or no list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "user", "content": 1}]}, "messages.0.content is 1"),
        ({"messages": ["hi"]}, "messages.0 is a str"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "part of type 'image_url'; only text",
        ),
        ({"tools": [{"type": "function"}]}, "tools is"),
        ({"response_format": {"type": "json_object"}}, "response_format is"),
        ({"logprobs": 3}, "logprobs is 3; in a chat it is a boolean"),
        ({"top_logprobs": 3}, "top_logprobs is 3 without logprobs"),
        ({"prompt": "a"}, "unknown field 'prompt'"),
    ],
)
def test_of_a_chat_too(body: Any, words: str) -> None:
    assert words in refusal(chat(body))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"url": "/v1/embeddings"}, "the ones served are /v1/completions and /v1/chat/completions"),
        ({"method": "GET"}, 'method is "GET"; it is POST'),
        ({"custom_id": 3}, "custom_id is 3; give a text"),
        ({"prompt": "a"}, "unknown field 'prompt' in a batch line"),
    ],
)
def test_a_line_s_own_fields_are_checked(change: dict[str, Any], words: str) -> None:
    assert words in refusal({**line({"prompt": "a"}), **change})


def test_a_run_of_batch_lines_goes_on_at_every_byte_and_fails_lines_whole(tmp_path: Path) -> None:
    records = [
        line({"prompt": ["a", "b"], "n": 2}, "1"),
        line({"prompt": ["a", "FAIL"]}, "2"),
        chat({}, "3"),
        line({"prompt": ["c", "d"], "seed": 3}, "4"),
    ]
    plan = Plan(write_records(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")
    manifest = write_run(plan)
    whole = plan.output.read_bytes()
    failed = json.loads(RunFolder(plan.output).errors.read_text())
    assert (failed["id"], failed["index"]) == ("2", 1)

    for length in range(whole.rindex(b"\n", 0, -1) + 1, len(whole), 9):
        plan.output.write_bytes(whole[:length])

        assert write_run(plan).rows_sha256 == manifest.rows_sha256
        assert plan.output.read_bytes() == whole

    flat = Plan(plan.source, tmp_path / "out.parquet")
    assert write_run(flat).rows_sha256 == manifest.rows_sha256


def test_the_errors_of_a_batch_are_a_batch(tmp_path: Path) -> None:
    source = write_records(tmp_path / "in.jsonl", [line({"prompt": "FAIL"}, "1")])
    plan = Plan(source, tmp_path / "out.jsonl")
    write_run(plan)
    mended = tmp_path / "mended.jsonl"
    mended.write_text(RunFolder(plan.output).errors.read_text().replace("FAIL", "fine"))

    with writing(Plan(mended, tmp_path / "again.jsonl")) as (opened, _writer, _manifest):
        (row,) = opened.rows

    assert isinstance(row, InputRow)
    assert (row.id, row.request.prompt, row.place.attempts) == ("1", "fine", 0)


def test_an_id_of_any_length_is_answered(tmp_path: Path) -> None:
    records = [line({"prompt": "a"}, "x" * 1000)]
    plan = Plan(write_records(tmp_path / "in.jsonl", records), tmp_path / "out.jsonl")

    write_run(plan)

    assert json.loads(plan.output.read_text())["custom_id"] == "x" * 1000
