"""The serving loop with an engine of plain ints: what every job, good or bad, is answered with."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes import AheadEngine, FakeClock, FakeEngine, LetterTokenizer, letter, text_after

from shoal.validation import parse
from shoal.wire import Completion, GenerationResult, JobResult
from shoal_worker.events import EngineState, Event, RequestEnded, StepRun
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.loop import ServingLoop
from shoal_worker.messages import (
    FromEngine,
    JobDone,
    JobRefused,
    Observed,
    Submit,
    TextDelta,
)
from shoal_worker.scheduler import Decode, Prefill, Scheduler
from shoal_worker.text import TextCodec

TABLE = LaneTable([LaneSpec("interactive", 2, 64), LaneSpec("bulk", 4, 64)])
EOS = 0


@pytest.fixture(
    autouse=True,
    scope="module",
    params=[(False, False), (True, True), (True, False)],
    ids=["in step", "ahead", "ahead of a slow host"],
)
def engine_kind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Engines on a CPU, on a GPU that the loop waits for, and on one that waits for the loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Serving, "runs_ahead", request.param[0])
        patch.setattr(Serving, "waits", request.param[1])
        yield


class Serving:
    """A loop with its fakes, and everything that it has said."""

    runs_ahead = False
    waits = False

    def __init__(
        self,
        *,
        table: LaneTable = TABLE,
        tokens_per_step: int = 1,
        fail_at: Collection[int] = (),
        tokenizer: LetterTokenizer | None = None,
    ) -> None:
        self.clock = FakeClock()
        self.engine = FakeEngine(
            self.clock,
            tokens_per_step=tokens_per_step,
            runs_ahead=self.runs_ahead,
            waits=self.waits,
            fail_at=fail_at,
        )
        self.loop = ServingLoop(
            self.engine,
            Scheduler(table),
            TextCodec(tokenizer or LetterTokenizer(), frozenset({EOS}), 1000, table),
            model_name="letters",
            fingerprint="f" * 16,
            clock=self.clock,
        )
        self.said: list[FromEngine] = []

    def submit(
        self,
        *requests: dict[str, Any],
        job_id: str = "job",
        queued_s: float = 0.0,
        priority: int = 0,
        streams: bool = False,
        **options: Any,
    ) -> None:
        job = {"v": 1, "requests": list(requests)}
        message = Submit(job_id, "shoal-default", job, queued_s, priority, streams, **options)
        self.loop.submit(message)

    def step(self, num_steps: int = 1) -> None:
        for _ in range(num_steps):
            self.said += self.loop.step()

    def run(self) -> None:
        """Step until nothing is in the making; the slots are then free again."""
        self.step()
        for _ in range(2000):
            if self.loop.is_idle:
                break
            self.step()
        assert self.loop.is_idle, "it never ends"
        assert not self.engine.slots
        assert not self.loop._streams
        assert not self.loop._jobs

    def results(self, job_id: str = "job") -> list[GenerationResult]:
        """The one answer to a job, as a client reads it."""
        (done,) = [m for m in self.said if isinstance(m, JobDone) and m.job_id == job_id]
        return parse(JobResult, done.result).results

    def result(self, job_id: str = "job") -> GenerationResult:
        (only,) = self.results(job_id)
        return only

    def completion(self, job_id: str = "job") -> Completion:
        (only,) = self.result(job_id).completions
        return only

    def error_code(self, job_id: str = "job") -> str | None:
        error = self.result(job_id).error
        return None if error is None else error.code

    def answered(self) -> list[str]:
        return [m.job_id for m in self.said if isinstance(m, JobDone)]

    def deltas(self, job_id: str = "job") -> list[str]:
        return [m.text for m in self.said if isinstance(m, TextDelta) and m.job_id == job_id]

    def events(self) -> list[Event]:
        return [event for m in self.said if isinstance(m, Observed) for event in m.events]


def request(prompt: str = "ab", *, max_tokens: int = 4, **fields: Any) -> dict[str, Any]:
    """A request; what is no field of it goes to its sampling."""
    outer = {"id", "service_class", "model", "deadline", "metadata"}
    own = {name: value for name, value in fields.items() if name in outer}
    sampling = {name: value for name, value in fields.items() if name not in outer}
    return {"prompt": prompt, "sampling": {"max_tokens": max_tokens, **sampling}, **own}


# --- results


def test_a_request_is_answered_with_its_completion() -> None:
    serving = Serving()
    serving.submit(request("ab", max_tokens=3))

    serving.run()

    result = serving.result()
    assert (result.id, result.model, result.fingerprint) == ("job", "letters", "f" * 16)
    assert result.error is None
    assert result.text == text_after("ab", 3)
    assert serving.completion().token_ids == [letter((97, 98), i) for i in range(3)]
    assert serving.completion().finish_reason == "length"
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (2, 3)


def test_results_come_in_the_jobs_order_whichever_request_ends_first() -> None:
    serving = Serving()
    lengths = [9, 1, 5, 2, 7, 1]
    serving.submit(*(request(f"p{i}", max_tokens=n) for i, n in enumerate(lengths)))

    serving.run()

    results = serving.results()
    assert [result.text for result in results] == [
        text_after(f"p{i}", n) for i, n in enumerate(lengths)
    ]
    assert [result.id for result in results] == [f"job:{i}" for i in range(6)]


def test_a_request_keeps_the_id_it_came_with() -> None:
    serving = Serving()
    serving.submit(request(id="mine"), request())

    serving.run()

    assert [result.id for result in serving.results()] == ["mine", "job:1"]


@pytest.mark.parametrize("num_samples", [1, 2, 3, 7])
@pytest.mark.parametrize("service_class", ["interactive", "bulk"])
def test_samples_are_numbered_and_counted_together(num_samples: int, service_class: str) -> None:
    serving = Serving()
    serving.submit(request(n=num_samples, service_class=service_class), request("other"))

    serving.run()

    first, other = serving.results()
    assert [completion.index for completion in first.completions] == list(range(num_samples))
    assert first.usage.prompt_tokens == 2
    assert first.usage.completion_tokens == 4 * num_samples
    assert other.text == text_after("other", 4)


@pytest.mark.parametrize("streams", [False, True])
def test_samples_with_stop_strings_end_in_one_step_and_are_all_there(streams: bool) -> None:
    serving = Serving()
    whole = text_after("ab", 8)
    serving.submit(request(n=4, max_tokens=8, stop=whole[5]), streams=streams)

    serving.run()

    texts = [completion.text for completion in serving.result().completions]
    assert texts == [whole[: whole.index(whole[5])]] * 4


def test_token_ids_are_a_prompt_too() -> None:
    serving = Serving()
    serving.submit({"prompt": [97, 98]})

    serving.run()

    assert serving.result().text == text_after("ab", 16)


def test_a_stop_token_ends_a_completion_and_stays_out_of_its_text() -> None:
    serving = Serving()
    whole = text_after("ab", 8)
    serving.submit(request(max_tokens=8, stop_token_ids=[ord(whole[3])]))

    serving.run()

    at = whole.index(whole[3])
    completion = serving.completion()
    assert (completion.text, completion.finish_reason) == (whole[:at], "stop")
    assert len(completion.token_ids) == at + 1


@pytest.mark.parametrize("tokens_per_step", [1, 3, 100])
def test_a_stop_string_ends_a_completion_at_the_same_token_however_many_come_at_once(
    tokens_per_step: int,
) -> None:
    serving = Serving(tokens_per_step=tokens_per_step)
    whole = text_after("ab", 20)
    stop = whole[6:9]
    serving.submit(request(max_tokens=20, stop=stop), request("other", max_tokens=20))

    serving.run()

    first, other = serving.results()
    at = whole.index(stop)
    (completion,) = first.completions
    assert (completion.text, completion.finish_reason) == (whole[:at], "stop")
    assert len(completion.token_ids) == first.usage.completion_tokens == at + 3
    assert other.text == text_after("other", 20)


def test_a_result_does_not_depend_on_its_company() -> None:
    alone, crowded = Serving(), Serving(tokens_per_step=2)
    alone.submit(request("mine", max_tokens=9), job_id="mine")
    for i in range(9):
        crowded.submit(request(f"other {i}", max_tokens=i + 1), job_id=f"other{i}")
    crowded.submit(request("mine", max_tokens=9), job_id="mine")

    alone.run()
    crowded.run()

    assert alone.completion("mine") == crowded.completion("mine")


# --- requests and jobs that cannot run


@pytest.mark.parametrize(
    "job",
    [
        *(None, 5, "text", [], {}, {"v": 1, "requests": []}),
        {"v": 2, "requests": [{"prompt": "a"}]},
        {"v": 1, "requests": [{"prompt": "a"}, {"prompt": ""}]},
    ],
)
def test_what_is_no_job_is_refused_with_the_reason(job: object) -> None:
    serving = Serving()

    serving.loop.submit(Submit("job", "q", job, 0.0, 0))
    serving.run()

    refused = [m for m in serving.said if isinstance(m, JobRefused)]
    assert [m.job_id for m in refused] == ["job"]
    assert refused[0].reason.startswith("not a GenerationJob: ")
    assert serving.answered() == []


def test_a_request_for_another_model_fails_and_names_both() -> None:
    serving = Serving()
    serving.submit(request(model="gpt2"), request(model="letters"))

    serving.run()

    first, second = serving.results()
    assert first.error is not None
    assert (first.error.code, first.error.retryable) == ("model_mismatch", False)
    assert "'gpt2'" in first.error.message
    assert "'letters'" in first.error.message
    assert second.error is None


def test_a_prompt_too_long_fails_and_its_neighbours_go_on() -> None:
    serving = Serving()
    serving.submit(request("a"), request("b" * 61), request("c" * 60), request("d"))

    serving.run()

    results = serving.results()
    codes = [result.error and result.error.code for result in results]
    assert codes == [None, "prompt_too_long", None, None]
    assert results[1].error is not None
    assert "61 tokens and max_tokens is 4, 65 in all" in results[1].error.message
    assert results[2].text == text_after("c" * 60, 4)


def test_a_token_id_past_the_vocabulary_is_an_invalid_request() -> None:
    serving = Serving()
    serving.submit({"prompt": [1000]})

    serving.run()

    assert serving.error_code() == "invalid_request"


def test_a_job_of_nothing_but_failures_is_answered_without_a_step() -> None:
    serving = Serving()
    serving.submit(request(model="gpt2"))

    serving.step()

    assert serving.error_code() == "model_mismatch"
    assert serving.engine.steps == []


# --- cancelling


def test_a_running_request_is_cancelled_alone() -> None:
    serving = Serving()
    serving.submit(request("a", max_tokens=9), request("b", max_tokens=9))
    serving.step(3)

    serving.loop.cancel("job", 0)
    serving.run()

    first, second = serving.results()
    assert first.error is not None
    assert (first.error.code, first.completions) == ("cancelled", [])
    assert second.text == text_after("b", 9)


def test_a_waiting_request_is_cancelled_and_never_runs() -> None:
    serving = Serving()
    serving.submit(*(request(f"p{i}", max_tokens=9) for i in range(5)))
    serving.step()

    serving.loop.cancel("job", 4)
    serving.run()

    assert serving.results()[4].error is not None
    read = {row.sequence.key.request_index for step in serving.engine.steps for row in step.rows}
    assert read == {0, 1, 2, 3}


def test_a_cancelled_request_of_many_samples_frees_all_their_slots() -> None:
    serving = Serving()
    serving.submit(request("a", n=6, max_tokens=9), request("b"))
    serving.step(2)

    serving.loop.cancel("job", 0)
    serving.run()

    assert [result.error is None for result in serving.results()] == [False, True]


def test_the_last_open_request_of_a_job_is_cancelled_and_the_job_answered() -> None:
    serving = Serving()
    serving.submit(request("a", max_tokens=1), request("b", max_tokens=9))
    serving.step(3)

    serving.loop.cancel("job", 1)
    serving.step()

    assert [result.error is None for result in serving.results()] == [True, False]
    serving.run()


@pytest.mark.parametrize("index", [1, 7, -1, -2])
def test_an_index_that_the_job_has_not_changes_nothing(index: int) -> None:
    serving = Serving()
    serving.submit(request())
    serving.step()

    serving.loop.cancel("job", index)
    serving.run()

    assert serving.result().error is None


@pytest.mark.parametrize("index", [None, 0])
def test_cancelling_what_has_ended_or_never_was_changes_nothing(index: int | None) -> None:
    serving = Serving()
    serving.submit(request())
    serving.run()

    serving.loop.cancel("job", index)
    serving.loop.cancel("other", index)
    serving.run()

    assert serving.answered() == ["job"]


def test_cancelling_a_request_that_has_its_result_keeps_the_result() -> None:
    serving = Serving()
    serving.submit(request("a", max_tokens=1), request("b", max_tokens=9))
    serving.step(2)

    serving.loop.cancel("job", 0)
    serving.loop.cancel("job", 0)
    serving.run()

    assert serving.results()[0].text == text_after("a", 1)


@pytest.mark.parametrize("num_steps", [0, 1, 4])
def test_a_cancelled_job_is_not_answered_and_frees_its_slots(num_steps: int) -> None:
    serving = Serving()
    whole = text_after("a", 9)
    serving.submit(
        request("a", max_tokens=9, n=2, stop=whole[1]), request("b", max_tokens=9), streams=True
    )
    serving.submit(request("c"), job_id="other")
    serving.step(num_steps)

    serving.loop.cancel("job", None)
    serving.run()

    assert serving.answered() == ["other"]


def test_a_cancelled_job_leaves_nothing_of_samples_that_had_ended() -> None:
    # One slot: the first sample ends while the second one still waits.
    serving = Serving(table=LaneTable([LaneSpec("interactive", 1, 64)]))
    serving.submit(request(n=2, max_tokens=2, stop="unlikely"))
    serving.step(2)
    assert len(serving.loop._streams) == 2

    serving.loop.cancel("job", None)

    assert not serving.loop._streams
    serving.run()


def test_a_job_that_is_claimed_again_begins_anew_and_is_answered_once() -> None:
    serving = Serving()
    serving.submit(request("a", max_tokens=9), streams=True)
    serving.step(3)

    serving.submit(request("a", max_tokens=9), streams=True)
    serving.run()

    assert serving.answered() == ["job"]
    assert serving.result().text == text_after("a", 9)


# --- deadlines


def test_a_deadline_before_the_start_is_an_expired_error() -> None:
    serving = Serving()
    serving.submit(request(deadline=5.0), request(), queued_s=5.0)

    serving.run()

    first, second = serving.results()
    assert first.error is not None
    assert (first.error.code, first.error.retryable) == ("expired", False)
    assert "deadline of 5 s" in first.error.message
    assert second.error is None
    assert all(
        row.sequence.key.request_index == 1 for step in serving.engine.steps for row in step.rows
    )


def test_a_deadline_while_waiting_for_a_slot_is_an_expired_error() -> None:
    serving = Serving(table=LaneTable([LaneSpec("interactive", 1, 64)]))
    serving.submit(request("a", max_tokens=20))
    serving.submit(request("b", deadline=3.0), job_id="late", streams=True)

    serving.run()

    assert serving.error_code("late") == "expired"
    assert serving.deltas("late") == []


@pytest.mark.parametrize("streams", [False, True])
def test_a_deadline_midway_ends_with_the_text_so_far(streams: bool) -> None:
    serving = Serving()  # A step takes half a second.
    serving.submit(request(max_tokens=50, deadline=5.0), queued_s=3.0, streams=streams)

    serving.run()

    completion = serving.completion()
    assert completion.finish_reason == "deadline"
    assert completion.text == text_after("ab", 4)
    assert len(completion.token_ids) == 4
    assert "".join(serving.deltas()) == (completion.text if streams else "")


@pytest.mark.parametrize("streams", [False, True])
def test_what_was_held_back_for_a_stop_string_is_given_out_at_the_deadline(streams: bool) -> None:
    serving = Serving()
    whole = text_after("ab", 4)
    serving.submit(request(max_tokens=50, deadline=2.0, stop=whole[2:] + "!"), streams=streams)

    serving.run()

    assert serving.completion().text == whole
    assert "".join(serving.deltas()) == (whole if streams else "")


def test_a_deadline_between_samples_keeps_those_that_are_there() -> None:
    serving = Serving(table=LaneTable([LaneSpec("interactive", 1, 64)]))
    serving.submit(request(n=3, max_tokens=3, deadline=2.0))

    serving.run()

    completions = serving.result().completions
    assert [(c.text, c.finish_reason) for c in completions] == [
        (text_after("ab", 3), "length"),
        (text_after("ab", 1), "deadline"),
        ("", "deadline"),
    ]


def test_a_deadline_not_reached_changes_nothing() -> None:
    serving = Serving()
    serving.submit(request(max_tokens=4, deadline=2.01))

    serving.run()

    assert serving.completion().finish_reason == "length"


# --- what fails


def test_a_failed_step_is_for_whoever_runs_the_loop() -> None:
    serving = Serving(fail_at=[1])
    serving.submit(request("a"))
    serving.step()

    with pytest.raises(RuntimeError, match="as it was told to"):
        serving.step()


class _FailingTokenizer(LetterTokenizer):
    """Trips over one prompt."""

    def __call__(self, text: str, **_options: bool) -> dict[str, list[int]]:
        if text == "secret":
            raise OverflowError(f"cannot read {text}")
        return super().__call__(text)


def test_a_prompt_that_trips_the_tokenizer_fails_alone_and_stays_out_of_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    serving = Serving(tokenizer=_FailingTokenizer())
    serving.submit(request("secret"), request("b"))

    serving.run()

    first, second = serving.results()
    assert first.error is not None
    assert first.error.code == "internal_error"
    assert second.text == text_after("b", 4)
    assert "OverflowError" in caplog.text
    assert "secret" not in caplog.text + first.error.message


def test_a_job_nested_too_deeply_is_refused() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    serving = Serving()

    serving.loop.submit(Submit("job", "q", {"v": 1, "requests": deep}, 0.0, 0))
    serving.step()

    assert [type(m) for m in serving.said if not isinstance(m, Observed)] == [JobRefused]


# --- parts of jobs


def test_some_requests_of_a_job_run_alone_under_their_own_ids_and_seeds() -> None:
    requests = [request(f"p{i}", temperature=1.0) for i in range(4)]
    serving = Serving()
    serving.submit(*requests, job_id="whole")
    serving.submit(*requests, job_id="part", indexes=(1, 3))

    serving.run()

    (done,) = [m for m in serving.said if isinstance(m, JobDone) and m.job_id == "part"]
    assert done.indexes == (1, 3)
    assert [result.id for result in serving.results("part")] == ["part:1", "part:3"]
    texts = [result.text for result in serving.results("whole")]
    assert [result.text for result in serving.results("part")] == [texts[1], texts[3]]


def test_a_request_of_a_part_is_cancelled_by_its_place_in_the_job() -> None:
    serving = Serving()
    serving.submit(request("a"), request("b"), request("c"), indexes=(1, 2))

    serving.loop.cancel("job", 0)
    serving.loop.cancel("job", 2)
    serving.run()

    first, second = serving.results()
    assert (first.error, first.text) == (None, text_after("b", 4))
    assert second.error is not None
    assert second.error.code == "cancelled"


def test_a_foreign_job_s_time_out_counts_from_its_prefill() -> None:
    serving = Serving(table=LaneTable([LaneSpec("interactive", 1, 64)]))
    serving.submit(request("a", max_tokens=20))
    serving.submit(request("b", max_tokens=20), job_id="second", limit_s=1.0)

    serving.run()

    assert serving.completion().finish_reason == "length"
    second = serving.completion("second")
    assert (second.finish_reason, second.text) == ("deadline", text_after("b", 2))


# --- streaming


@pytest.mark.parametrize("tokens_per_step", [1, 3])
@pytest.mark.parametrize("stop", [[], ["unlikely"], "at the end"])
def test_streamed_pieces_join_to_the_final_text(
    tokens_per_step: int, stop: list[str] | str
) -> None:
    serving = Serving(tokens_per_step=tokens_per_step)
    if stop == "at the end":
        stop = [text_after("ab", 12)[8:10], text_after("ab", 12)[10:] + "zz"]
    serving.submit(request(max_tokens=12, stop=stop), streams=True)

    serving.run()

    assert len(serving.deltas()) > 1
    assert "".join(serving.deltas()) == serving.result().text


def test_each_piece_says_where_in_the_text_it_belongs() -> None:
    serving = Serving(tokens_per_step=2)
    serving.submit(request(max_tokens=9, stop=text_after("ab", 9)[4] + "zz"), streams=True)

    serving.run()

    pieces = [m for m in serving.said if isinstance(m, TextDelta)]
    whole = serving.result().text
    assert [whole[piece.at : piece.at + len(piece.text)] for piece in pieces] == serving.deltas()
    assert [piece.at for piece in pieces] == [
        sum(len(earlier.text) for earlier in pieces[:i]) for i in range(len(pieces))
    ]


def test_only_the_first_completion_of_a_job_that_streams_is_streamed() -> None:
    serving = Serving()
    serving.submit(request("a", n=2), request("b"), streams=True)
    serving.submit(request("c"), job_id="silent")

    serving.run()

    assert "".join(serving.deltas()) == text_after("a", 4)
    assert serving.deltas("silent") == []


def test_a_piece_is_said_in_the_step_that_made_it_and_before_the_result() -> None:
    serving = Serving()
    serving.submit(request(max_tokens=2), streams=True)

    first = serving.loop.step()
    second = serving.loop.step()

    assert [type(m) for m in first] == [TextDelta, Observed]
    assert [type(m) for m in second] == [TextDelta, JobDone, Observed]


# --- events


def test_times_are_counted_from_submission_and_never_negative() -> None:
    serving = Serving(table=LaneTable([LaneSpec("bulk", 1, 64)]))
    serving.submit(request("a", max_tokens=3), queued_s=2.0, job_id="first")
    serving.submit(request("b", max_tokens=3), queued_s=4.0, job_id="second")

    serving.run()

    first, second = serving.result("first").timing, serving.result("second").timing
    assert (first.queue_s, first.prefill_s, first.decode_s) == (2.0, 0.5, 1.0)
    assert (second.queue_s, second.prefill_s, second.decode_s) == (5.5, 0.5, 1.0)
    ended = [event for event in serving.events() if isinstance(event, RequestEnded)]
    assert [event.ttft_s for event in ended] == [2.5, 6.0]
    # On a device that runs ahead the first is answered during the next step, which takes 0.5 s.
    assert [event.e2e_s for event in ended] == [4.0 if serving.runs_ahead else 3.5, 7.0]
    assert {event.queue for event in ended} == {"shoal-default"}


def test_a_clock_that_jumps_back_makes_no_negative_times() -> None:
    serving = Serving()
    serving.submit(request())
    serving.clock.now_s -= 100.0

    serving.run()

    assert min(serving.result().timing.model_dump().values()) >= 0.0


def test_every_request_ends_in_one_event_with_its_reasons_or_its_error() -> None:
    serving = Serving(table=LaneTable([LaneSpec("interactive", 2, 64)]))
    whole = text_after("ab", 8)
    serving.submit(
        request(n=2),
        request("cd", model="gpt2"),
        request(max_tokens=8, stop=whole[3]),
        request("ef", deadline=1.0),
        queued_s=1.0,
    )

    serving.run()

    ended = [event for event in serving.events() if isinstance(event, RequestEnded)]
    reasons = sorted((event.finish_reasons, event.error_code) for event in ended)
    assert reasons == [
        ((), "expired"),
        ((), "model_mismatch"),
        (("length", "length"), None),
        (("stop",), None),
    ]


def check_steps(serving: Serving, table: LaneTable) -> None:
    """Every position that the engine computed is in exactly one event, as work or as padding."""
    runs = [event for event in serving.events() if isinstance(event, StepRun)]
    assert len(runs) == len(serving.engine.steps)
    slots = {lane.name: lane.slots for lane in table.lanes}
    made = 0
    for event, step in zip(runs, serving.engine.steps, strict=True):
        assert (event.lane, event.rows) == (step.lane.name, len(step.rows))
        assert event.duration_s > 0
        assert event.tokens >= 0
        assert event.padding_tokens >= 0
        if isinstance(step, Prefill):
            assert event.phase == "prefill"
            assert event.tokens + event.padding_tokens == step.bucket.rows * step.bucket.length
            made += event.rows
        else:
            assert isinstance(step, Decode)
            assert event.phase == "decode"
            passes = serving.engine._tokens_per_step
            assert event.tokens + event.padding_tokens == slots[event.lane] * passes
            assert event.tokens_by_queue == (("shoal-default", event.tokens),)
            made += event.tokens
    read = sum(event.tokens for event in runs if event.phase == "prefill")
    assert read == serving.engine.num_prompt_tokens
    generated = [r for m in serving.said if isinstance(m, JobDone) for r in m.result["results"]]
    assert made == sum(result["usage"]["completion_tokens"] for result in generated)


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.text("abc", min_size=1, max_size=40),
            st.integers(1, 12),
            st.integers(1, 3),
            st.sampled_from(["interactive", "bulk"]),
            st.lists(st.text("abcdefgh", min_size=1, max_size=2), max_size=2),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 4),
    st.booleans(),
)
def test_whatever_is_asked_is_answered_and_every_position_is_counted_once(
    asked: list[tuple[str, int, int, str, list[str]]], tokens_per_step: int, streams: bool
) -> None:
    serving = Serving(tokens_per_step=tokens_per_step)
    for i, (prompt, max_tokens, n, service_class, stop) in enumerate(asked):
        one = request(prompt, max_tokens=max_tokens, n=n, service_class=service_class, stop=stop)
        serving.submit(one, job_id=f"job{i}", streams=streams)

    serving.run()

    assert sorted(serving.answered()) == sorted(f"job{i}" for i in range(len(asked)))
    for i, (prompt, max_tokens, n, _class, stop) in enumerate(asked):
        whole = text_after(prompt, max_tokens)
        texts = [completion.text for completion in serving.result(f"job{i}").completions]
        assert len(texts) == n
        assert len(set(texts)) == 1
        assert whole.startswith(texts[0])
        assert not any(one in texts[0] for one in stop)
        rest = whole.removeprefix(texts[0])
        assert not rest or any(rest.startswith(one) for one in stop)
        assert "".join(serving.deltas(f"job{i}")) == (texts[0] if streams else "")
    check_steps(serving, TABLE)


def test_declared_shapes_are_no_misses() -> None:
    serving = Serving()
    serving.loop.declare_shapes()
    for service_class in ("interactive", "bulk"):
        serving.submit(
            *(request("a" * n, service_class=service_class) for n in (1, 33, 60)),
            job_id=service_class,
        )

    serving.run()

    states = [event for event in serving.events() if isinstance(event, EngineState)]
    assert {state.shape_cache_misses for state in states} == {0}


def test_a_shape_that_was_not_declared_is_one_miss() -> None:
    serving = Serving()
    serving.submit(request(), request("c"))
    serving.run()
    serving.submit(request(), request("d"))

    serving.run()

    states = [event for event in serving.events() if isinstance(event, EngineState)]
    assert states[-1].shape_cache_misses == 2  # One bucket and one lane.


def test_the_state_is_told_every_second_while_busy_and_once_more_when_idle() -> None:
    serving = Serving()
    serving.submit(request(max_tokens=10))

    serving.run()

    states = [event for event in serving.events() if isinstance(event, EngineState)]
    assert len(states) == 6
    assert [state.requests_running for state in states] == [1] * 5 + [0]
    assert states[0].slots_in_use == {"bulk-4x64": (0, 4), "interactive-2x64": (1, 2)}
    assert states[-1].kv_usage_ratio == 0.0


def test_a_decode_lasts_from_the_lanes_last_step_but_not_over_idle_time() -> None:
    serving = Serving()
    serving.submit(request(max_tokens=2, service_class="bulk"))
    serving.run()
    serving.clock.now_s += 500.0
    serving.submit(request(max_tokens=3, service_class="bulk"))
    serving.submit(request("other", max_tokens=9), job_id="other")
    serving.run()

    runs = [event for event in serving.events() if isinstance(event, StepRun)]
    bulk = [event.duration_s for event in runs if event.lane == "bulk-4x64"]
    assert bulk == [0.5, 0.5, 0.5, 1.0, 1.0]


def test_a_request_that_only_counts_is_answered_without_a_step() -> None:
    serving = Serving()
    counted = {"prompt": "abcd", "count_only": True, "sampling": {"n": 2}}

    serving.submit(counted, {"prompt": "abc", "sampling": {"max_tokens": 2}})
    serving.run()

    first, second = serving.results()
    assert [(one.index, one.text, one.token_ids) for one in first.completions] == [
        (0, "", []),
        (1, "", []),
    ]
    assert (first.usage.prompt_tokens, first.usage.completion_tokens) == (4, 0)
    assert len(second.completions[0].token_ids) == 2
    assert serving.engine.num_prompt_tokens == 3


def test_a_job_that_only_counts_is_answered_at_once() -> None:
    serving = Serving()

    serving.submit({"prompt": "abcd", "count_only": True}, job_id="other")
    serving.step()

    assert serving.result("other").usage.prompt_tokens == 4
    assert serving.engine.steps == []


def test_a_result_tells_how_much_of_its_prompt_was_cut_off() -> None:
    serving = Serving()
    longest = TABLE.max_positions("interactive")

    serving.submit(
        {"prompt": "a" * longest, "on_long": "truncate-left", "sampling": {"max_tokens": 4}}
    )
    serving.run()

    assert serving.result().truncated_tokens == 4
    assert serving.result().usage.prompt_tokens == longest - 4


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Serving, "runs_ahead", True)
    monkeypatch.setattr(Serving, "waits", False)


def bulk(prompt: str, **sampling: Any) -> dict[str, Any]:
    return {"prompt": prompt, "sampling": sampling, "service_class": "bulk"}


@pytest.mark.usefixtures("ahead")
@pytest.mark.parametrize("waits", [True, False])
def test_a_bulk_answer_is_written_during_the_next_step(
    waits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Serving, "waits", waits)
    serving = Serving()
    serving.submit(bulk("ab", max_tokens=1), job_id="short")
    serving.submit(bulk("cd", max_tokens=9), job_id="long")

    serving.step()
    assert serving.answered() == []
    serving.step()

    assert serving.answered() == ["short"]
    assert len(serving.engine.steps) == 2


@pytest.mark.usefixtures("ahead")
def test_a_job_that_comes_while_rows_run_is_taken_in_during_the_next_step() -> None:
    serving = Serving()
    serving.submit(bulk("ab", max_tokens=9), job_id="first")
    serving.step()

    serving.submit(bulk("cd", max_tokens=2), job_id="second")
    assert serving.loop._scheduler.num_waiting == 0
    serving.step()

    assert serving.loop._scheduler.num_waiting == 1
    serving.run()
    assert sorted(serving.answered()) == ["first", "second"]


@pytest.mark.usefixtures("ahead")
def test_a_job_that_is_cancelled_before_it_is_taken_in_never_runs() -> None:
    serving = Serving()
    serving.submit(bulk("ab", max_tokens=5), job_id="first")
    serving.step()

    serving.submit(bulk("cd", max_tokens=2), job_id="second")
    serving.loop.cancel("second", None)
    serving.submit(bulk("ef", max_tokens=2), bulk("gh", max_tokens=2), job_id="third")
    serving.loop.cancel("third", 0)
    serving.run()

    assert sorted(serving.answered()) == ["first", "third"]
    codes = [result.error and result.error.code for result in serving.results("third")]
    assert codes == ["cancelled", None]
    assert serving.engine.num_prompt_tokens == 4


@pytest.mark.usefixtures("ahead")
def test_a_job_that_comes_again_smaller_before_its_answer_is_written_is_answered_once() -> None:
    serving = Serving()
    serving.submit(bulk("xy", max_tokens=9), job_id="other")
    serving.submit(*[bulk("ab", max_tokens=1)] * 3, job_id="again")
    serving.step()

    serving.submit(bulk("cd", max_tokens=2), job_id="again")
    serving.run()

    assert serving.completion("again").text == text_after("cd", 2)
    assert serving.completion("other").text == text_after("xy", 9)


@pytest.mark.usefixtures("ahead")
def test_a_job_that_comes_again_before_it_is_taken_in_runs_once() -> None:
    serving = Serving()
    serving.submit(bulk("ab", max_tokens=5), job_id="first")
    serving.step()

    for prompt in ("cd", "efg"):
        serving.submit(bulk(prompt, max_tokens=2), job_id="again")
    serving.run()

    assert serving.completion("again").text == text_after("efg", 2)
    assert serving.answered().count("again") == 1


JOBS = st.lists(
    st.tuples(st.text("abc", min_size=1, max_size=20), st.integers(1, 9), st.booleans()),
    min_size=1,
    max_size=14,
)


@settings(deadline=None)
@given(jobs=JOBS, tokens_per_step=st.integers(1, 5), cancelled=st.integers(0, 30))
def test_a_slot_is_refilled_behind_its_last_tokens_and_nobody_s_are_lost(
    jobs: list[tuple[str, int, bool]], tokens_per_step: int, cancelled: int
) -> None:
    serving = Serving()
    serving.engine = AheadEngine(serving.clock, tokens_per_step=tokens_per_step)
    serving.loop._engine = serving.engine
    for number, (prompt, max_tokens, is_bulk) in enumerate(jobs):
        request = bulk(prompt, max_tokens=max_tokens, n=1 + number % 2)
        request["service_class"] = "bulk" if is_bulk else "interactive"
        serving.submit(request, job_id=str(number))
        serving.step(number % 3)
    if str(cancelled) in serving.loop._jobs:
        serving.loop.cancel(str(cancelled), None)
        jobs[cancelled] = ("", 0, False)
    serving.run()

    kept = [(number, *job) for number, job in enumerate(jobs) if job[0]]
    for number, prompt, max_tokens, _ in kept:
        texts = {completion.text for completion in serving.result(str(number)).completions}
        assert texts == {text_after(prompt, max_tokens)}
    runs = [event for event in serving.events() if isinstance(event, StepRun)]
    assert all(run.padding_tokens >= 0 for run in runs)
    if len(kept) == len(jobs):
        made = sum(run.tokens for run in runs if run.phase == "decode")
        assert made == sum(max_tokens * (1 + number % 2) for number, _, max_tokens, _ in kept)


def test_a_slot_is_free_with_the_launch_of_its_last_token() -> None:
    serving = Serving(table=LaneTable([LaneSpec("bulk", 1, 64)]))
    serving.engine = AheadEngine(serving.clock, tokens_per_step=4)
    serving.loop._engine = serving.engine
    for job_id in ("first", "second"):
        serving.submit(bulk("ab", max_tokens=5), job_id=job_id)

    serving.step(3)

    assert [type(step) for step in serving.engine.steps] == [Prefill, Decode, Prefill]
    assert serving.answered() == []
    serving.run()
    assert serving.completion("first").text == text_after("ab", 5)
    assert serving.completion("second").text == text_after("ab", 5)
