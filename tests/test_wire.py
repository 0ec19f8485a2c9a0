"""The wire format: limits from both sides, types, error texts, round trips, the frozen bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from shoal.errors import InvalidRequest
from shoal.validation import parse
from shoal.wire import (
    MAX_METADATA_BYTES,
    MAX_METADATA_LEVELS,
    MAX_PROMPT_BYTES,
    MAX_REQUESTS_PER_JOB,
    QUEUES,
    Completion,
    GenerationJob,
    GenerationRequest,
    GenerationResult,
    JobResult,
    Logprobs,
    ResultError,
    SamplingParams,
    Timing,
    Usage,
)

GOLDEN = Path(__file__).parent / "golden"

# Field, the last value inside, the first outside, and the limit as the error tells it.
LIMITS = [
    ("max_tokens", 1, 0, "1"),
    ("max_tokens", 131_072, 131_073, "131072"),
    ("min_tokens", 0, -1, "0"),
    ("temperature", 0.0, -0.001, "0"),
    ("temperature", 100.0, 100.001, "100"),
    ("top_k", -1, -2, "-1"),
    ("top_k", 2**31 - 1, 2**31, "2147483647"),
    ("top_p", 5e-324, 0.0, "0"),
    ("top_p", 1.0, 1.001, "1"),
    ("min_p", 0.0, -0.001, "0"),
    ("min_p", 1.0, 1.001, "1"),
    ("repetition_penalty", 5e-324, 0.0, "0"),
    ("repetition_penalty", 100.0, 100.001, "100"),
    ("presence_penalty", -2.0, -2.001, "-2"),
    ("presence_penalty", 2.0, 2.001, "2"),
    ("frequency_penalty", -2.0, -2.001, "-2"),
    ("frequency_penalty", 2.0, 2.001, "2"),
    ("seed", 0, -1, "0"),
    ("seed", 2**63 - 1, 2**63, str(2**63 - 1)),
    ("n", 1, 0, "1"),
    ("n", 128, 129, "128"),
    ("logprobs", 0, -1, "0"),
    ("logprobs", 20, 21, "20"),
]
INTS = ("max_tokens", "min_tokens", "top_k", "seed", "n", "logprobs")
FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def refusal(model: type[BaseModel], data: object) -> str:
    """The text with which this is refused."""
    with pytest.raises(InvalidRequest) as caught:
        parse(model, data)
    return str(caught.value)


def test_sampling_defaults_are_those_of_the_public_interface() -> None:
    assert SamplingParams().model_dump() == {
        "max_tokens": 16,
        "min_tokens": 0,
        "temperature": 1.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": [],
        "stop_token_ids": [],
        "ignore_eos": False,
        "seed": None,
        "n": 1,
        "logprobs": None,
        "logit_bias": {},
        "include_stop_str_in_output": False,
    }


def test_a_request_is_interactive_and_for_any_model_unless_told() -> None:
    request = GenerationRequest(prompt="a")

    assert request.service_class == "interactive"
    assert (request.id, request.model, request.deadline) == (None, None, None)
    assert (request.sampling, request.metadata) == (SamplingParams(), {})


def test_queues_are_named_in_the_order_of_their_priority() -> None:
    assert QUEUES == ("shoal-high", "shoal-default", "shoal-bulk")


@pytest.mark.parametrize(("field", "inside", "outside", "limit"), LIMITS)
def test_a_limit_holds_to_its_last_value_and_names_field_value_and_limit(
    field: str, inside: float, outside: float, limit: str
) -> None:
    assert getattr(parse(SamplingParams, {field: inside}), field) == inside

    text = refusal(SamplingParams, {field: outside})
    assert text.startswith(f"{field} is {outside!r}:")
    assert text.endswith(limit)


@pytest.mark.parametrize("field", INTS)
@pytest.mark.parametrize("value", [True, False, "5", "1", 1.0, 1.5, [], {}])
def test_an_integer_field_takes_nothing_but_integers(field: str, value: object) -> None:
    assert refusal(SamplingParams, {field: value}).startswith(f"{field} is {value!r}:")


@pytest.mark.parametrize("field", FLOATS)
@pytest.mark.parametrize("value", [True, False, "0.5", None, [], float("nan"), float("inf")])
def test_a_float_field_takes_nothing_but_finite_numbers(field: str, value: object) -> None:
    assert refusal(SamplingParams, {field: value}).startswith(f"{field} is {value!r}:")


@pytest.mark.parametrize("field", FLOATS)
def test_a_float_field_takes_an_integer(field: str) -> None:
    assert getattr(parse(SamplingParams, {field: 1}), field) == 1.0


@pytest.mark.parametrize("field", ["ignore_eos", "include_stop_str_in_output"])
@pytest.mark.parametrize("value", [0, 1, "true", "", None])
def test_a_flag_takes_nothing_but_true_and_false(field: str, value: object) -> None:
    assert refusal(SamplingParams, {field: value}).startswith(f"{field} is {value!r}:")


def test_min_tokens_may_reach_max_tokens_and_no_further() -> None:
    assert parse(SamplingParams, {"min_tokens": 16}).min_tokens == 16
    text = refusal(SamplingParams, {"min_tokens": 17})
    assert text == "min_tokens is 17; max_tokens allows 16"


def test_one_stop_string_may_come_without_a_list() -> None:
    assert parse(SamplingParams, {"stop": "\n"}).stop == ["\n"]


@pytest.mark.parametrize(
    ("stop", "field", "limit"),
    [
        ("", "stop.0", "1"),
        (["a", "b" * 257], "stop.1", "256"),
        (["a"] * 17, "stop", "16"),
        (("a",), "stop", "list"),
        ([1], "stop.0", "string"),
        (None, "stop", "list"),
        (["\ud800"], "stop.0", "unicode"),
    ],
)
def test_stop_strings_are_few_short_and_not_empty(stop: object, field: str, limit: str) -> None:
    text = refusal(SamplingParams, {"stop": stop})

    assert text.startswith(f"{field} is ")
    assert limit in text


def test_stop_strings_are_taken_up_to_their_limits() -> None:
    stop = ["b" * 256] * 16

    assert parse(SamplingParams, {"stop": stop}).stop == stop


@pytest.mark.parametrize("tokens", [[-1], [2**31], [True], ["1"], [1.0], [1] * 1025, 5])
def test_stop_token_ids_are_token_ids(tokens: object) -> None:
    assert refusal(SamplingParams, {"stop_token_ids": tokens}).startswith("stop_token_ids")


def test_logit_bias_keys_may_be_numbers_or_as_in_json_their_digits() -> None:
    assert parse(SamplingParams, {"logit_bias": {"7": -100, 8: 100}}).logit_bias == {
        7: -100,
        8: 100,
    }


@pytest.mark.parametrize(
    "bias",
    [
        {"-1": 1.0},
        {"x": 1.0},
        {"": 1.0},
        {"٣": 1.0},
        {True: 1.0},
        {1.0: 1.0},
        {2**31: 1.0},
        {5: 100.001},
        {5: -100.001},
        {5: float("nan")},
        {5: "1"},
        {5: True},
        dict.fromkeys(range(1025), 0.0),
        [5],
        "5",
        {"9" * 5000: 1.0},
    ],
)
def test_logit_bias_out_of_range_is_refused_by_name(bias: object) -> None:
    assert refusal(SamplingParams, {"logit_bias": bias}).startswith("logit_bias")


def test_an_unknown_field_is_refused_with_the_likely_one() -> None:
    text = refusal(SamplingParams, {"max_token": 5})

    assert text == "unknown field 'max_token'; did you mean 'max_tokens'?"


@pytest.mark.parametrize(
    ("model", "data", "known"),
    [
        (SamplingParams, {"zzz": 1}, SamplingParams),
        (GenerationRequest, {"prompt": "a", "zzz": 1}, GenerationRequest),
        (GenerationRequest, {"prompt": "a", "sampling": {"zzz": 1}}, SamplingParams),
        (GenerationJob, {"requests": [{"prompt": "a"}], "zzz": 1}, GenerationJob),
        (GenerationJob, {"requests": [{"prompt": "a", "zzz": 1}]}, GenerationRequest),
        (
            GenerationJob,
            {"requests": [{"prompt": "a", "sampling": {"zzz": 1}}]},
            SamplingParams,
        ),
    ],
)
def test_an_unknown_field_like_no_other_is_answered_with_those_of_its_place(
    model: type[BaseModel], data: object, known: type[BaseModel]
) -> None:
    text = refusal(model, data)

    assert text == f"unknown field 'zzz'; the fields are {', '.join(known.model_fields)}"


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ("\ud800", "not valid Unicode"),
        ([1, True], "prompt.token_ids.1 is True: Input should be a valid integer"),
        ([1, -1], "prompt.token_ids.1 is -1: Input should be greater than or equal to 0"),
        ([2**31], f"prompt.token_ids.0 is {2**31}: Input should be less than or equal to"),
        (["1"], "prompt.token_ids.0 is '1'"),
        ([1.0], "prompt.token_ids.0 is 1.0"),
        (5, "prompt is 5: Input should be a string or a list of token ids"),
        (None, "prompt is None: Input should be a string or a list of token ids"),
        (b"text", "prompt is b'text': Input should be a string or a list of token ids"),
        ((1, 2), "prompt is (1, 2): Input should be a string or a list of token ids"),
    ],
)
def test_a_prompt_is_text_or_token_ids(prompt: object, text: str) -> None:
    assert text in refusal(GenerationRequest, {"prompt": prompt})


@pytest.mark.parametrize(("unit", "num_bytes"), [("a", 1), ("é", 2), ([7], 4)])
def test_a_prompt_is_measured_in_bytes(unit: Any, num_bytes: int) -> None:
    longest = unit * (MAX_PROMPT_BYTES // num_bytes)
    assert parse(GenerationRequest, {"prompt": longest}).prompt == longest

    text = refusal(GenerationRequest, {"prompt": longest + unit})
    assert f"{MAX_PROMPT_BYTES + num_bytes} bytes; the limit is {MAX_PROMPT_BYTES}" in text
    assert len(text) < 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("id", ""),
        ("id", "i" * 257),
        ("id", 5),
        ("id", "\ud800"),
        ("model", ""),
        ("model", "m" * 1025),
        ("deadline", 0),
        ("deadline", -1.0),
        ("deadline", float("inf")),
        ("deadline", float("nan")),
        ("deadline", True),
        ("deadline", "5"),
        ("service_class", "Bulk"),
        ("service_class", None),
        ("sampling", None),
        ("sampling", []),
        ("metadata", None),
        ("metadata", []),
        ("metadata", {1: 2}),
    ],
)
def test_a_request_field_out_of_range_is_refused_by_name(field: str, value: object) -> None:
    assert refusal(GenerationRequest, {"prompt": "a", field: value}).startswith(field)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes", {1, 2}])
def test_metadata_that_json_cannot_hold_is_refused(value: object) -> None:
    text = refusal(GenerationRequest, {"prompt": "a", "metadata": {"key": [value]}})

    assert text.startswith("metadata: metadata must be JSON")


def test_metadata_is_measured_in_bytes_of_json() -> None:
    longest = {"k": "v" * (MAX_METADATA_BYTES - len('{"k": ""}'))}
    assert parse(GenerationRequest, {"prompt": "a", "metadata": longest}).metadata == longest

    text = refusal(GenerationRequest, {"prompt": "a", "metadata": {"k": longest["k"] + "v"}})
    assert f"{MAX_METADATA_BYTES + 1} bytes as JSON; the limit is {MAX_METADATA_BYTES}" in text


def nested(num_levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(num_levels - 1):
        value = [value]
    return value


@pytest.mark.parametrize("num_levels", [MAX_METADATA_LEVELS + 1, 300, 950, 100_000])
def test_metadata_nested_too_deep_is_refused_and_exhausts_no_stack(num_levels: int) -> None:
    value = nested(num_levels - 1)

    text = refusal(GenerationRequest, {"prompt": "a", "metadata": {"key": value}})

    assert f"deeper than {MAX_METADATA_LEVELS} levels" in text


def test_metadata_nested_to_the_limit_can_be_sent() -> None:
    value = nested(MAX_METADATA_LEVELS - 1)

    request = parse(GenerationRequest, {"prompt": "a", "metadata": {"key": value}})

    job = GenerationJob(requests=[request])
    assert parse(GenerationJob, json.loads(json.dumps(job.model_dump(mode="json")))) == job


def test_metadata_that_contains_itself_is_refused() -> None:
    circle: list[Any] = []
    circle += [circle, circle]

    assert "deeper than" in refusal(GenerationRequest, {"prompt": "a", "metadata": {"c": circle}})


@pytest.mark.parametrize(
    "value",
    [[nested(950)], {"a": nested(950)}, "x" * 10**6, 10**5000],
    ids=["deep list", "deep object", "long text", "huge number"],
)
def test_a_wrong_value_of_any_size_is_named_shortly(value: object) -> None:
    for data in ({"prompt": "a", "service_class": value}, {"prompt": "a", "metadata": [value]}):
        assert len(refusal(GenerationRequest, data)) < 200


def test_an_unknown_field_of_any_length_is_named_shortly() -> None:
    assert len(refusal(GenerationJob, {"requests": [{"prompt": "a"}], "x" * 10**6: 1})) < 200


def test_a_thousand_broken_rules_make_a_short_text_that_says_how_many_more() -> None:
    text = refusal(GenerationRequest, {"prompt": ["not a token id"] * 100_000})

    assert text.startswith("prompt.token_ids.0 is 'not a token id'")
    assert text.endswith("; and 99992 more")
    assert len(text) < 2000


def test_several_broken_rules_are_told_together() -> None:
    text = refusal(GenerationRequest, {"sampling": {"max_tokens": 0, "n": 0}, "deadline": -1.0})

    assert "sampling.max_tokens is 0" in text
    assert "sampling.n is 0" in text
    assert "deadline is -1.0" in text


@pytest.mark.parametrize("data", [None, 5, "text", [], [{}]])
def test_what_is_no_object_at_all_is_named_after_what_it_should_be(data: object) -> None:
    assert refusal(GenerationJob, data).startswith(f"GenerationJob is {data!r}: ")


@pytest.mark.parametrize("num_requests", [0, MAX_REQUESTS_PER_JOB + 1])
def test_a_job_holds_one_to_a_thousand_requests(num_requests: int) -> None:
    assert refusal(GenerationJob, {"requests": [{"prompt": "a"}] * num_requests}).startswith(
        "requests is "
    )


@pytest.mark.parametrize("version", [0, 2, "1", None])
@pytest.mark.parametrize("model", [GenerationJob, JobResult])
def test_another_version_of_the_format_is_refused(model: type[BaseModel], version: object) -> None:
    text = refusal(model, {"v": version, "requests": [{"prompt": "a"}], "results": []})

    assert f"v is {version!r}: Input should be 1" in text


def test_a_result_of_nothing_is_no_result() -> None:
    assert "neither" in refusal(JobResult, {"results": [{"id": "a"}]})


def test_a_result_without_completions_has_an_empty_text() -> None:
    result = GenerationResult(id="a", error=ResultError(code="expired", message="too late"))

    assert result.text == ""


def test_a_prompt_is_in_a_result_only_once_the_client_filled_it_in() -> None:
    result = GenerationResult(id="a", error=ResultError(code="expired", message="too late"))

    assert "prompt" not in result.model_dump(mode="json")
    filled = result.model_copy(update={"prompt": "Once"})
    assert filled.model_dump(mode="json")["prompt"] == "Once"


def test_a_request_is_a_value_and_does_not_change() -> None:
    request = GenerationRequest(prompt="a")

    with pytest.raises(ValueError, match="frozen"):
        request.prompt = "b"  # type: ignore[misc]


TEXT = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20)
TOKENS = st.integers(0, 2**31 - 1)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | FINITE | st.integers(-(2**60), 2**60) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
SAMPLING: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"max_tokens": st.integers(16, 131_072)},
    optional={
        "min_tokens": st.integers(0, 16),
        "temperature": st.floats(0, 100),
        "top_k": st.integers(-1, 2**31 - 1),
        "top_p": st.floats(0, 1, exclude_min=True),
        "min_p": st.floats(0, 1),
        "repetition_penalty": st.floats(0, 100, exclude_min=True),
        "presence_penalty": st.floats(-2, 2),
        "frequency_penalty": st.floats(-2, 2),
        "stop": TEXT | st.lists(TEXT, max_size=16),
        "stop_token_ids": st.lists(TOKENS, max_size=4),
        "ignore_eos": st.booleans(),
        "seed": st.none() | st.integers(0, 2**63 - 1),
        "n": st.integers(1, 128),
        "logprobs": st.none() | st.integers(0, 20),
        "logit_bias": st.dictionaries(TOKENS, st.floats(-100, 100), max_size=4),
        "include_stop_str_in_output": st.booleans(),
    },
)
REQUESTS: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {"prompt": TEXT | st.lists(TOKENS, min_size=1, max_size=5)},
    optional={
        "sampling": SAMPLING,
        "id": TEXT,
        "service_class": st.sampled_from(["interactive", "bulk"]),
        "model": TEXT,
        "deadline": st.floats(0, 1e300, exclude_min=True),
        "metadata": st.dictionaries(TEXT, JSON, max_size=3),
    },
)


@settings(deadline=None)
@given(st.lists(REQUESTS, min_size=1, max_size=3))
def test_any_valid_job_survives_json_with_and_without_its_defaults(
    requests: list[dict[str, Any]],
) -> None:
    job = parse(GenerationJob, {"v": 1, "requests": requests})

    for short in (True, False):
        sent = json.dumps(job.model_dump(mode="json", exclude_defaults=short))
        assert parse(GenerationJob, json.loads(sent)) == job


FIELDS = sorted({*SamplingParams.model_fields, *GenerationRequest.model_fields, "v", "requests"})
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.fixed_dictionaries({"requests": st.lists(ANYTHING, max_size=3)}) | ANYTHING)
def test_whatever_comes_is_a_job_or_an_invalid_request(data: object) -> None:
    try:
        job = parse(GenerationJob, data)
    except InvalidRequest:
        return
    assert parse(GenerationJob, json.loads(job.model_dump_json())) == job


GOLDEN_JOB = GenerationJob(
    requests=[
        GenerationRequest(
            prompt="Grüße aus 北京 🐟",
            sampling=SamplingParams(
                max_tokens=64,
                min_tokens=2,
                temperature=0.8,
                top_k=50,
                top_p=0.95,
                min_p=0.05,
                repetition_penalty=1.1,
                presence_penalty=0.5,
                frequency_penalty=-0.5,
                stop=["\n", "END"],
                stop_token_ids=[50256],
                ignore_eos=True,
                seed=7,
                n=2,
                logprobs=3,
                logit_bias={11: -100.0, 13: 2.5},
                include_stop_str_in_output=True,
            ),
            id="row-1",
            service_class="bulk",
            model="gpt2",
            deadline=30.0,
            metadata={"line": 1, "tags": ["a", None]},
        ),
        GenerationRequest(prompt=[464, 3290]),
    ]
)
GOLDEN_RESULT = JobResult(
    results=[
        GenerationResult(
            id="row-1",
            completions=[
                Completion(
                    index=0,
                    text=" Fische 🐟\n",
                    token_ids=[376, 198],
                    finish_reason="stop",
                    logprobs=Logprobs(
                        tokens=[" F", "\n"],
                        token_logprobs=[-0.5, -1.25],
                        top_logprobs=[{" F": -0.5, " G": -2.0}, {"\n": -1.25}],
                    ),
                ),
                Completion(index=1, text=" Meer", token_ids=[2185], finish_reason="length"),
            ],
            usage=Usage(prompt_tokens=9, completion_tokens=3),
            model="gpt2",
            fingerprint="0123456789abcdef",
            timing=Timing(queue_s=0.25, prefill_s=0.5, decode_s=1.0),
        ),
        GenerationResult(
            id="job:1",
            model="gpt2",
            fingerprint="0123456789abcdef",
            error=ResultError(code="engine_error", message="the engine failed", retryable=True),
        ),
    ]
)


def test_the_frozen_job_reads_as_what_was_sent() -> None:
    sent = json.loads((GOLDEN / "job-v1.json").read_bytes())

    assert parse(GenerationJob, sent) == GOLDEN_JOB


def test_the_frozen_result_reads_as_what_was_answered() -> None:
    answered = json.loads((GOLDEN / "result-v1.json").read_bytes())

    assert parse(JobResult, answered) == GOLDEN_RESULT


def test_a_result_is_written_as_the_frozen_bytes() -> None:
    written = json.dumps(GOLDEN_RESULT.model_dump(mode="json")).encode() + b"\n"

    assert written == (GOLDEN / "result-v1.json").read_bytes()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({}, "prompt is missing"),
        ({"messages": []}, "prompt is missing"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "b"}]}, "both prompt and"),
        ({"messages": [{"role": "", "content": "b"}]}, "messages.0.role is ''"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages are not valid Unicode"),
        ({"messages": [{"role": "user", "content": "b" * 2**20 + "c"}]}, "the limit is 1048576"),
        ({"messages": [{"role": "user", "content": "b", "audio": 1}]}, "unknown field 'audio'"),
        ({"prompt": "a", "on_long": "cut"}, "on_long is 'cut'"),
    ],
)
def test_a_request_has_a_prompt_or_messages(data: dict[str, Any], words: str) -> None:
    assert words in refusal(GenerationRequest, data)


def test_what_was_not_asked_for_is_not_sent() -> None:
    request = GenerationRequest(prompt="a")
    result = GenerationResult(
        id="a", completions=[Completion(index=0, text="", token_ids=[], finish_reason="stop")]
    )

    assert request.model_dump(mode="json", exclude_defaults=True) == {"prompt": "a"}
    assert not {"truncated_tokens", "prompt"} & result.model_dump(mode="json").keys()
