"""Requests through a loop of this process: results in order, and no disorder after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable

import pytest
from tests.fakes import FakeClock, FakeEngine, LetterTokenizer, text_after

from shoal.errors import GenerationFailed
from shoal.wire import MAX_REQUESTS_PER_JOB, GenerationRequest, SamplingParams
from shoal_worker.events import Event, RequestEnded, StepRun
from shoal_worker.in_process import InProcess
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.loop import ServingLoop
from shoal_worker.scheduler import Decode, Prefill, Scheduler
from shoal_worker.sequence import SampledToken
from shoal_worker.text import TextCodec

TABLE = LaneTable([LaneSpec("bulk", 4, 64)])
PROMPTS = [f"prompt {number}" for number in range(10)]


class WatchedEngine(FakeEngine):
    """Calls `at_step` in the middle of the step of this number."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(clock)
        self.at_step: dict[int, Callable[[], None]] = {}

    def decode(
        self, step: Decode, meanwhile: Callable[[], bool] = lambda: False
    ) -> list[list[SampledToken]]:
        tokens = super().decode(step, meanwhile)
        self.at_step.pop(len(self.steps), lambda: None)()
        return tokens


class Serving:
    """A loop over that engine."""

    def __init__(self) -> None:
        clock = FakeClock()
        self.engine = WatchedEngine(clock)
        self.events: list[Event] = []
        self.loop = ServingLoop(
            self.engine,
            Scheduler(TABLE),
            TextCodec(LetterTokenizer(), frozenset({0}), 1000, TABLE),
            model_name="letters",
            fingerprint="f",
            clock=clock,
        )
        self.in_process = InProcess(self.loop, self.events.append)

    def texts(self, prompts: list[str], max_tokens: int = 5) -> list[str]:
        results = self.in_process.run(requests(prompts, max_tokens))
        return [result.text for result in results]


def requests(prompts: list[str], max_tokens: int = 5) -> list[GenerationRequest]:
    sampling = SamplingParams(max_tokens=max_tokens)
    return [
        GenerationRequest(prompt=prompt, sampling=sampling, service_class="bulk")
        for prompt in prompts
    ]


def interrupt() -> None:
    signal.raise_signal(signal.SIGINT)


def test_results_are_in_the_order_of_the_requests_over_several_jobs() -> None:
    prompts = [f"p{number}" for number in range(MAX_REQUESTS_PER_JOB + 3)]

    assert Serving().texts(prompts, 2) == [text_after(prompt, 2) for prompt in prompts]


def test_no_requests_have_no_results() -> None:
    assert Serving().texts([]) == []


def test_every_step_and_every_end_is_told() -> None:
    serving = Serving()

    serving.texts(PROMPTS)

    told = [event for event in serving.events if isinstance(event, StepRun)]
    assert len(told) == len(serving.engine.steps)
    assert sum(isinstance(event, RequestEnded) for event in serving.events) == len(PROMPTS)


def test_ctrl_c_in_a_step_is_heard_after_it_and_leaves_nothing_behind() -> None:
    serving = Serving()
    serving.engine.at_step[4] = interrupt

    with pytest.raises(KeyboardInterrupt):
        serving.texts(PROMPTS)

    assert len(serving.engine.steps) == 4, "the step ran to its end, and none after it"
    assert serving.engine.slots == set()
    assert serving.loop.is_idle
    assert serving.texts(PROMPTS) == [text_after(prompt, 5) for prompt in PROMPTS]


def test_ctrl_c_in_the_last_step_is_heard_too() -> None:
    serving = Serving()
    serving.engine.at_step[5] = interrupt

    with pytest.raises(KeyboardInterrupt):
        serving.texts(PROMPTS[:4])

    assert serving.texts(PROMPTS[:4]) == [text_after(prompt, 5) for prompt in PROMPTS[:4]]


def test_a_second_ctrl_c_breaks_the_step_off_and_every_later_call_says_so() -> None:
    serving = Serving()

    def twice() -> None:
        interrupt()
        interrupt()

    serving.engine.at_step[4] = twice
    with pytest.raises(KeyboardInterrupt):
        serving.texts(PROMPTS)

    for _ in range(2):
        with pytest.raises(GenerationFailed, match=r"KeyboardInterrupt.*make a new one"):
            serving.texts(PROMPTS)


def test_an_engine_that_fails_in_a_step_is_not_asked_again() -> None:
    serving = Serving()

    def fail() -> None:
        raise MemoryError("no room")

    serving.engine.at_step[3] = fail
    with pytest.raises(MemoryError):
        serving.texts(PROMPTS)

    with pytest.raises(GenerationFailed, match="MemoryError"):
        serving.texts(PROMPTS)


def test_an_interrupt_is_the_caller_s_own_handler_s_and_it_is_put_back() -> None:
    serving = Serving()
    heard: list[int] = []
    serving.engine.at_step[4] = interrupt
    before = signal.signal(signal.SIGINT, lambda signum, _frame: heard.append(signum))
    try:
        mine = signal.getsignal(signal.SIGINT)
        texts = serving.texts(PROMPTS)
        assert signal.getsignal(signal.SIGINT) is mine
    finally:
        signal.signal(signal.SIGINT, before)

    assert heard == [signal.SIGINT]
    assert texts == [text_after(prompt, 5) for prompt in PROMPTS], "it chose to go on"


def test_another_thread_than_the_main_one_may_generate() -> None:
    serving = Serving()
    texts: list[str] = []

    thread = threading.Thread(target=lambda: texts.extend(serving.texts(PROMPTS)))
    thread.start()
    thread.join(20)

    assert texts == [text_after(prompt, 5) for prompt in PROMPTS]


def test_a_prefill_that_is_interrupted_runs_to_its_end_too() -> None:
    serving = Serving()
    whole = serving.engine.prefill

    def prefill(step: Prefill) -> list[list[SampledToken]]:
        interrupt()
        return whole(step)

    serving.engine.prefill = prefill  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        serving.texts(PROMPTS)

    serving.engine.prefill = whole  # type: ignore[method-assign]
    assert serving.engine.slots == set()
    assert serving.texts(PROMPTS) == [text_after(prompt, 5) for prompt in PROMPTS]
