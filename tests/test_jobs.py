"""Requests as RQ jobs and back, judged by RQ's own serializer, classes and scripts."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st
from rq.job import Job as RQJob
from rq.results import Result
from rq.serializers import JSONSerializer
from tests.test_wire import GOLDEN, GOLDEN_JOB, GOLDEN_RESULT

from shoal.cancellation import CANCEL_REQUEST
from shoal.errors import (
    Cancelled,
    Expired,
    GenerationFailed,
    InvalidRequest,
    ModelMismatch,
    PromptTooLong,
    ShoalError,
)
from shoal.job_states import (
    JobState,
    StreamedText,
    error_from,
    read_job_result,
    read_states,
    result_of,
    state_commands,
)
from shoal.jobs import (
    ENQUEUE_ONCE,
    FAILURE_TTL_S,
    MAX_PACK_BYTES,
    MAX_RETRIES,
    Handle,
    OutgoingJob,
    as_requests,
    cancel_key,
    make_request,
    new_job_id,
    outgoing_job,
    pack,
    prompt_bytes,
    results_key,
    stream_key,
)
from shoal.validation import parse
from shoal.wire import (
    FUNCTION_NAME,
    MAX_REQUESTS_PER_JOB,
    GenerationJob,
    GenerationRequest,
    GenerationResult,
    JobResult,
    ResultError,
    SamplingParams,
)


def prompts(*texts: str) -> list[GenerationRequest]:
    return [GenerationRequest(prompt=text) for text in texts]


def job_hash(job: OutgoingJob) -> dict[str, Any]:
    """The fields that the job's commands leave in its hash."""
    fields: dict[str, Any] = {}
    for name, key, *words in job.commands:
        if name == "HSET":
            assert key == job.key
            fields |= dict(zip(words[::2], words[1::2], strict=True))
    return fields


def as_sent(value: Any) -> bytes:
    """A value as it goes over the line; RQ's statuses are enumerations of text."""
    return value if isinstance(value, bytes) else str(getattr(value, "value", value)).encode()


def sent_data(job: OutgoingJob) -> Any:
    return JSONSerializer.loads(zlib.decompress(job_hash(job)["data"]))


# --- writing a job


def test_the_data_is_the_function_name_and_one_argument_in_json() -> None:
    job = outgoing_job(prompts("a"))

    assert sent_data(job) == [FUNCTION_NAME, None, [{"v": 1, "requests": [{"prompt": "a"}]}], {}]


def test_a_job_is_written_as_the_frozen_bytes() -> None:
    job = outgoing_job(GOLDEN_JOB.requests)

    golden = (GOLDEN / "job-v1.json").read_bytes().rstrip(b"\n")
    written = zlib.decompress(job_hash(job)["data"])
    assert written == b'["shoal.generate", null, [' + golden + b"], {}]"


def test_many_requests_are_read_back_in_their_order() -> None:
    requests = [make_request(f"p{i}", fields={"max_tokens": i + 1}) for i in range(20)]

    _name, _instance, (argument,), _options = sent_data(outgoing_job(requests))

    assert parse(GenerationJob, argument).requests == requests


def test_rq_restores_the_job_that_was_written() -> None:
    job = outgoing_job(prompts("a", "b"), queue="shoal-high", job_id="j1", result_ttl_s=60)
    raw = {name.encode(): as_sent(value) for name, value in job_hash(job).items()}

    restored = RQJob("j1", connection=redis.Redis(), serializer=JSONSerializer)
    restored.restore(raw)

    assert restored.func_name == FUNCTION_NAME
    assert (restored.origin, restored.timeout, restored.result_ttl) == ("shoal-high", -1, 60)
    assert (restored.retries_left, restored.failure_ttl) == (MAX_RETRIES, FAILURE_TTL_S)
    assert restored.meta == {"requests": 2, "tokens": 32}


def test_the_commands_register_the_queue_write_the_hash_and_push_the_id_last() -> None:
    job = outgoing_job(prompts("a"), queue="q", job_id="j1")

    assert job.commands[0] == ("SADD", "rq:queues", "rq:queue:q")
    assert {command[0] for command in job.commands[1:-1]} == {"HSET"}
    assert job.commands[-1] == ("RPUSH", "rq:queue:q", "j1")


def test_script_arguments_are_each_command_behind_its_length() -> None:
    job = outgoing_job(prompts("a"))

    words, commands = list(job.script_args), []
    while words:
        length = words.pop(0)
        commands.append(tuple(words[:length]))
        del words[:length]
    assert tuple(commands) == job.commands


@pytest.mark.parametrize(
    ("texts", "description"),
    [(["secret"], "shoal.generate: 1 request"), (["secret"] * 2, "shoal.generate: 2 requests")],
)
def test_the_description_counts_requests_and_holds_no_prompt(
    texts: list[str], description: str
) -> None:
    job = outgoing_job(prompts(*texts))

    assert job_hash(job)["description"] == description
    readable = [field for field in job_hash(job) if field != "data"]
    assert not any("secret" in str(job_hash(job)[field]) for field in readable)


def test_meta_counts_samples_and_tokens_and_marks_a_job_that_streams() -> None:
    requests = [
        make_request("12345678", fields={"max_tokens": 10, "n": 3}),
        make_request([1, 2, 3], fields={"max_tokens": 5}),
    ]

    silent, streamed = (
        json.loads(job_hash(outgoing_job(requests, stream=stream))["meta"])
        for stream in (False, True)
    )

    assert silent == {"requests": 4, "tokens": 2 + 30 + 3 + 5}
    assert streamed == silent | {"stream": True}


def test_meta_names_the_kind_of_worker_that_a_job_is_bound_to() -> None:
    bound = outgoing_job(prompts("a"), fingerprint="f00d")

    assert json.loads(job_hash(bound)["meta"]) == {
        "requests": 1,
        "tokens": 16,
        "fingerprint": "f00d",
    }


@pytest.mark.parametrize("num_requests", [0, MAX_REQUESTS_PER_JOB + 1])
def test_a_job_of_too_few_or_too_many_requests_is_refused(num_requests: int) -> None:
    with pytest.raises(InvalidRequest, match="requests"):
        outgoing_job(prompts("a") * num_requests)


def test_a_job_takes_as_many_requests_as_the_wire_allows() -> None:
    job = outgoing_job(prompts("a") * MAX_REQUESTS_PER_JOB)

    assert len(job.handles) == MAX_REQUESTS_PER_JOB


@pytest.mark.parametrize("queue", ["", " q", "q\n", "a\tb", "\x00"])
def test_a_queue_name_that_nobody_could_type_is_refused(queue: str) -> None:
    with pytest.raises(InvalidRequest, match="queue is"):
        outgoing_job(prompts("a"), queue=queue)


@pytest.mark.parametrize("ttl", [0, -1, True, 1.5, "60", None])
def test_a_result_ttl_is_whole_seconds(ttl: Any) -> None:
    with pytest.raises(InvalidRequest, match="result_ttl is"):
        outgoing_job(prompts("a"), result_ttl_s=ttl)


# --- requests


def test_fields_and_options_make_a_request() -> None:
    request = make_request("a", fields={"top_k": 5}, deadline=2.0, model=None, id="x")

    assert request == GenerationRequest(
        prompt="a", sampling=SamplingParams(top_k=5), deadline=2.0, id="x"
    )


def test_sampling_and_single_fields_are_not_mixed() -> None:
    with pytest.raises(InvalidRequest, match=r"not both .got sampling and seed, top_k"):
        make_request("a", SamplingParams(), fields={"top_k": 5, "seed": 1})


def test_sampling_of_another_type_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="sampling is a dict"):
        make_request("a", {"top_k": 5})  # type: ignore[arg-type]


def test_a_misspelt_field_is_refused_with_the_likely_one() -> None:
    with pytest.raises(InvalidRequest, match="did you mean 'temperature'"):
        make_request("a", fields={"temprature": 1.0})
    with pytest.raises(InvalidRequest, match="did you mean 'deadline'"):
        make_request("a", deadlin=1.0)


def test_prompts_share_their_sampling_and_requests_keep_their_own() -> None:
    own = GenerationRequest(prompt="own", sampling=SamplingParams(max_tokens=1))

    made = list(as_requests(["a", [1, 2], own], None, {"top_k": 3}))

    shared = SamplingParams(top_k=3)
    assert made == [
        GenerationRequest(prompt="a", sampling=shared),
        GenerationRequest(prompt=[1, 2], sampling=shared),
        own,
    ]


# --- ids and handles


def test_an_idempotency_key_always_names_the_same_job_and_no_key_never_does() -> None:
    assert new_job_id("order 7") == new_job_id("order 7")
    assert new_job_id("order 7") != new_job_id("order 8")
    assert new_job_id() != new_job_id()


@settings(deadline=None)
@given(st.none() | st.text(st.characters(codec="utf-8")))
def test_every_job_id_is_one_that_rq_takes_and_a_handle_reads(key: str | None) -> None:
    job_id = new_job_id(key)

    RQJob(job_id, connection=redis.Redis())
    assert Handle.parse(job_id) == Handle(job_id)


JOB_IDS = st.from_regex(r"\A[A-Za-z0-9][A-Za-z0-9_-]{0,40}\Z")


@settings(deadline=None)
@given(JOB_IDS, st.integers(1, MAX_REQUESTS_PER_JOB), st.data())
def test_a_handle_is_read_back_from_its_name(
    job_id: str, num_requests: int, data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, num_requests - 1))
    handle = Handle(job_id, index, num_requests)

    parsed = Handle.parse(str(handle))

    assert (parsed.job_id, parsed.index) == (job_id, index)
    assert str(parsed) == str(handle)


@pytest.mark.parametrize(
    "text",
    ["", ":", "a:", ":1", "-", "a b", "a:1:2", "a:-1", "a:+1", "a: 1", "a:٣", "é", "a:1.0", "a\n"],
)
def test_what_is_no_job_id_is_refused_with_what_one_looks_like(text: str) -> None:
    with pytest.raises(InvalidRequest, match="job ids look like"):
        Handle.parse(text)


def test_an_index_of_thousands_of_digits_is_no_job_id() -> None:
    with pytest.raises(InvalidRequest):
        Handle.parse("a:" + "9" * 5000)


def test_a_jobs_handles_name_its_requests_in_order() -> None:
    assert [str(h) for h in outgoing_job(prompts("a"), job_id="j").handles] == ["j"]
    assert [str(h) for h in outgoing_job(prompts("a", "b"), job_id="j").handles] == ["j:0", "j:1"]


def test_keys_of_one_job_are_its_own() -> None:
    keys = [results_key("a"), stream_key("a"), cancel_key("a"), outgoing_job(prompts("a")).key]

    assert len(set(keys)) == 4
    assert all(key.startswith("rq:") for key in keys)


# --- packing


@settings(deadline=None)
@given(st.lists(st.integers(1, MAX_PACK_BYTES + 2), max_size=12), st.integers(-1, 5))
def test_packs_keep_the_order_and_their_limits(sizes: list[int], max_requests: int) -> None:
    requests = [GenerationRequest(prompt="a" * size) for size in sizes]

    groups = list(pack(requests, max_requests))

    assert [request for group in groups for request in group] == requests
    for group in groups:
        assert 1 <= len(group) <= max(1, max_requests)
        assert len(group) == 1 or sum(map(prompt_bytes, group)) <= MAX_PACK_BYTES


def test_a_pack_is_filled_to_its_last_byte() -> None:
    half = GenerationRequest(prompt="a" * (MAX_PACK_BYTES // 2))

    assert [len(group) for group in pack([half] * 3)] == [2, 1]
    assert [len(group) for group in pack([half, *prompts("a"), half])] == [2, 1]


def test_packs_come_as_the_input_is_read() -> None:
    endless = iter(lambda: GenerationRequest(prompt="a"), None)

    assert len(next(pack(endless, 4))) == 4


def test_a_prompt_is_sized_in_bytes_of_text_or_four_a_token() -> None:
    assert prompt_bytes(GenerationRequest(prompt="é")) == 2
    assert prompt_bytes(GenerationRequest(prompt=[1, 2])) == 8


# --- a stream of text


def piece(number: int, at: int, text: str) -> tuple[bytes, dict[bytes, bytes]]:
    return f"{number}-0".encode(), {b"at": str(at).encode(), b"text": text.encode()}


@settings(deadline=None)
@given(st.text("aé🐟", min_size=1, max_size=12), st.data())
def test_pieces_of_several_attempts_make_the_text_once(whole: str, data: st.DataObject) -> None:
    streamed, shown = StreamedText(), ""
    num_attempts = data.draw(st.integers(1, 3))
    for number in range(num_attempts):
        # Each attempt says the text from its start, in pieces of its own, some way through it.
        ends = sorted(data.draw(st.sets(st.integers(1, len(whole)), max_size=4)))
        spans = zip([0, *ends], ends, strict=False)
        entries = [piece(number, start, whole[start:end]) for start, end in spans]
        shown += streamed.add(entries)

    assert whole.startswith(shown)
    assert shown + streamed.rest(whole) == whole


def test_a_piece_behind_a_gap_waits_for_the_result() -> None:
    streamed = StreamedText()

    shown = streamed.add([piece(1, 0, "ab"), piece(2, 5, "fg")])

    assert (shown, streamed.rest("abcdefg")) == ("ab", "cdefg")
    assert streamed.last_id == "2-0"


def test_a_result_that_is_another_text_comes_whole_on_a_new_line_and_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    streamed = StreamedText("j7")
    streamed.add([piece(1, 0, "once upon")])

    rest = streamed.rest("once more, with feeling")

    assert rest == "\nonce more, with feeling"
    assert "job j7: its result is not the text streamed so far (9 characters)" in caplog.text
    assert "upon" not in caplog.text


# --- reading a job's state


def state(
    status: str | None, entry: dict[str, str] | None = None, *, expired_s: float | None = None
) -> JobState:
    """As Redis would tell it."""
    fields = {name.encode(): value.encode() for name, value in (entry or {}).items()}
    entries = [] if entry is None else [(b"1-0", fields)]
    replies = [None if status is None else status.encode(), entries, expired_s]
    return read_states(["j"], replies)["j"]


def rq_entry(**outcome: Any) -> dict[str, str]:
    """A result stream's entry as RQ writes it."""
    result = Result("j", connection=redis.Redis(), serializer=JSONSerializer, **outcome)
    return {name: str(value) for name, value in result.serialize().items()}


def finished(value: object) -> JobState:
    return state("finished", rq_entry(type=Result.Type.SUCCESSFUL, return_value=value))


def test_a_finished_jobs_results_are_read_as_rq_wrote_them() -> None:
    answer = finished(GOLDEN_RESULT.model_dump(mode="json"))

    assert read_job_result(answer, "j") == GOLDEN_RESULT


def test_a_missing_job_is_expired() -> None:
    with pytest.raises(Expired, match="no job j: it was never submitted here"):
        read_job_result(state(None), "j")


def test_an_expired_result_says_when_it_expired() -> None:
    with pytest.raises(Expired, match=r"result of job j expired at 2001-09-09 01:46:40\+00:00"):
        read_job_result(state(None, expired_s=1e9), "j")


def test_a_state_is_asked_for_with_what_its_reading_takes() -> None:
    assert state_commands("j") == (
        ("HGET", "rq:job:j", "status"),
        ("XREVRANGE", "rq:results:j", "+", "-", "COUNT", 1),
        ("ZSCORE", "rq:shoal:expiries", "j"),
    )


def test_several_states_are_read_from_one_row_of_replies() -> None:
    entry = (b"7-0", {b"type": b"1"})

    states = read_states(["a", "b"], [b"finished", [entry], None, None, [], 5.0])

    assert states == {
        "a": JobState("finished", entry_id="7-0", entry={b"type": b"1"}),
        "b": JobState(None, expired_s=5.0),
    }


@pytest.mark.parametrize("status", ["canceled", "stopped"])
def test_a_cancelled_job_is_cancelled_whatever_its_stream_holds(status: str) -> None:
    late = rq_entry(type=Result.Type.SUCCESSFUL, return_value={"v": 1, "results": []})

    for answer in (state(status), state(status, late)):
        with pytest.raises(Cancelled, match="job j was cancelled"):
            read_job_result(answer, "j")


def test_a_failed_jobs_reason_is_the_last_line_of_what_rq_recorded() -> None:
    entry = rq_entry(
        type=Result.Type.FAILED, exc_string="Traceback\n  line\nValueError: no model\n"
    )

    with pytest.raises(GenerationFailed, match=r"^job j failed: ValueError: no model$") as caught:
        read_job_result(state("failed", entry), "j")
    assert (caught.value.code, caught.value.retryable) == ("job_failed", True)


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"exc_string": ""},
        {"exc_string": "%%%"},
        {"exc_string": base64.b64encode(b"no zlib").decode()},
        {"exc_string": base64.b64encode(zlib.compress(b"\xff")).decode()},
        {"exc_string": base64.b64encode(zlib.compress(b" \n ")).decode()},
    ],
)
def test_a_failed_job_without_a_readable_reason_says_so(entry: dict[str, str]) -> None:
    with pytest.raises(GenerationFailed, match="no reason was recorded"):
        read_job_result(state("failed", entry), "j")


def test_a_failed_jobs_earlier_success_is_no_result() -> None:
    entry = rq_entry(type=Result.Type.SUCCESSFUL, return_value={"v": 1, "results": []})

    with pytest.raises(GenerationFailed, match="failed"):
        read_job_result(state("failed", entry), "j")


@pytest.mark.parametrize(
    "value",
    [
        "Unserializable return value",
        5,
        [],
        {},
        {"v": 2, "results": []},
        {"v": 1, "results": [{"id": "a"}]},
        {"v": 1, "results": [], "more": 1},
    ],
)
def test_a_return_value_of_another_format_is_a_bad_result(value: object) -> None:
    with pytest.raises(GenerationFailed, match="job j holds a result that is not") as caught:
        read_job_result(finished(value), "j")
    assert (caught.value.code, caught.value.retryable) == ("bad_result", False)


@pytest.mark.parametrize("raw", ["%", "e30", "", "AAAA", base64.b64encode(b"\xff\xfe").decode()])
def test_a_return_value_that_is_no_json_is_a_bad_result(raw: str) -> None:
    with pytest.raises(GenerationFailed) as caught:
        read_job_result(state("finished", {"return_value": raw}), "j")
    assert caught.value.code == "bad_result"


def test_a_finished_job_without_an_entry_failed() -> None:
    with pytest.raises(GenerationFailed, match="no reason was recorded"):
        read_job_result(state("finished"), "j")


@pytest.mark.parametrize("status", [None, "finished", "failed", "canceled", "stopped"])
def test_a_job_that_ended_or_is_gone_is_final(status: str | None) -> None:
    assert state(status).is_final


@pytest.mark.parametrize("status", ["queued", "started", "deferred", "scheduled"])
def test_a_job_that_goes_on_is_not_final(status: str) -> None:
    assert not state(status).is_final


# --- from a job's results to one request's


def answered(*results: GenerationResult) -> JobResult:
    return JobResult(results=list(results))


def failed(code: str, *, retryable: bool = False) -> GenerationResult:
    return GenerationResult(
        id="a", error=ResultError(code=code, message="it says why", retryable=retryable)
    )


def test_a_handle_gets_its_own_requests_result() -> None:
    other = failed("expired")
    mine = GOLDEN_RESULT.results[0]

    assert result_of(Handle("j", 1, 2), answered(other, mine)) == mine


def test_a_handle_past_the_last_request_is_told_how_many_there_are() -> None:
    with pytest.raises(InvalidRequest, match="j:2 is out of range: the job has 1 requests"):
        result_of(Handle("j", 2, 3), answered(failed("expired")))


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("cancelled", Cancelled),
        ("expired", Expired),
        ("prompt_too_long", PromptTooLong),
        ("invalid_request", InvalidRequest),
        ("model_mismatch", ModelMismatch),
        ("engine_error", GenerationFailed),
        ("of_a_later_version", GenerationFailed),
    ],
)
def test_an_error_code_is_raised_as_its_own_exception(code: str, kind: type[ShoalError]) -> None:
    with pytest.raises(ShoalError) as caught:
        result_of(Handle("j", 0, 2), answered(failed(code)))

    assert type(caught.value) is kind
    assert str(caught.value) == "j:0: it says why"
    assert getattr(caught.value, "code", code) == code


def test_an_unknown_error_may_be_tried_again_if_it_says_so() -> None:
    for retryable in (True, False):
        error = error_from(ResultError(code="engine_error", message="m", retryable=retryable), "j")
        assert isinstance(error, GenerationFailed)
        assert error.retryable is retryable


# --- the scripts, in a real server


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def test_a_job_sent_twice_is_queued_once(connection: redis.Redis) -> None:
    job = outgoing_job(prompts("a", "b"), queue="q", job_id=new_job_id("key"))
    enqueue = connection.register_script(ENQUEUE_ONCE)

    sent = [enqueue(keys=[job.key], args=job.script_args) for _ in range(2)]

    assert sent == [1, 0]
    assert connection.lrange("rq:queue:q", 0, -1) == [job.job_id.encode()]
    fetched = RQJob.fetch(job.job_id, connection=connection, serializer=JSONSerializer)
    assert fetched.get_status() == "queued"
    assert list(fetched.args) == [{"v": 1, "requests": [{"prompt": "a"}, {"prompt": "b"}]}]


def test_a_request_is_marked_as_cancelled_only_in_a_job_that_exists(
    connection: redis.Redis,
) -> None:
    job = outgoing_job(prompts("a", "b"))
    keys = [job.key, cancel_key(job.job_id)]
    cancel = connection.register_script(CANCEL_REQUEST)

    assert cancel(keys=keys, args=[1, 60]) == 0
    connection.register_script(ENQUEUE_ONCE)(keys=[job.key], args=job.script_args)
    assert cancel(keys=keys, args=[1, 60]) == 1

    assert connection.smembers(keys[1]) == {b"1"}
    assert 0 < int(connection.ttl(keys[1])) <= 60


def test_the_golden_files_end_in_one_line() -> None:
    for name in ("job-v1.json", "result-v1.json"):
        assert Path(GOLDEN / name).read_text().count("\n") == 1
