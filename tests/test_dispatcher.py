"""What the dispatcher makes of an engine's answers and of its death."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shoal_worker.dispatcher import Dispatcher
from shoal_worker.events import EngineDied, Event, RequestEnded
from shoal_worker.held_jobs import HeldJobs
from shoal_worker.messages import JobDone, JobRefused
from shoal_worker.probation import LONELY_DEATHS

QUEUE = "shoal-bulk"


class FakeEngine:
    """An engine that takes what it is told, and dies when the test says so."""

    def __init__(self) -> None:
        self.ready: object = object()
        self.served = None
        self.last_death = "was killed by SIGSEGV"
        self.died_of_memory = False
        self.told: list[object] = []

    def tell(self, message: object) -> None:
        self.told.append(message)

    def work_begins(self) -> None:
        pass


def claimed(job_id: str, num_requests: int) -> Any:
    argument = {"v": 1, "requests": [{"prompt": "p"}] * num_requests}
    job = SimpleNamespace(
        args=[argument], kwargs={}, meta={}, timeout=None, enqueued_at=None, created_at=None
    )
    return SimpleNamespace(
        job=job,
        id=job_id,
        queue=QUEUE,
        requests=num_requests,
        tokens=0,
        deaths=0,
        execution=SimpleNamespace(id="this run"),
    )


@pytest.mark.parametrize(("execution_id", "num_ended"), [("this run", 1), ("an earlier job", 0)])
def test_only_the_answer_to_the_run_that_is_held_ends_it(execution_id: str, num_ended: int) -> None:
    held = HeldJobs()
    held.hold(claimed("job", 1))
    dispatcher = Dispatcher(FakeEngine(), held, (QUEUE,), list[Event]().append)  # type: ignore[arg-type]

    dispatcher.done(JobDone("job", {"v": 1, "results": [{}]}, execution_id=execution_id))
    dispatcher.refused(JobRefused("job", "no GenerationJob", execution_id))

    assert len(held.to_commit()) == num_ended


def dispatcher_with(num_requests: int) -> tuple[Dispatcher, FakeEngine, list[Event]]:
    engine, held, events = FakeEngine(), HeldJobs(), list[Event]()
    held.hold(claimed("job", num_requests))
    return Dispatcher(engine, held, (QUEUE,), events.append), engine, events  # type: ignore[arg-type]


def test_a_death_of_many_for_want_of_memory_is_told_as_a_split() -> None:
    dispatcher, engine, events = dispatcher_with(4)
    engine.died_of_memory = True

    dispatcher.engine_died()

    assert events == [EngineDied(out_of_memory=True, was_split=True)]


def test_a_death_of_an_idle_engine_splits_nothing() -> None:
    engine, events = FakeEngine(), list[Event]()
    dispatcher = Dispatcher(engine, HeldJobs(), (QUEUE,), events.append)  # type: ignore[arg-type]

    dispatcher.engine_died()

    assert events == [EngineDied(out_of_memory=False, was_split=False)]


def test_a_request_that_is_given_up_has_failed_in_its_queue() -> None:
    dispatcher, _engine, events = dispatcher_with(1)

    for _ in range(LONELY_DEATHS):
        dispatcher.next_group()
        dispatcher.engine_died()

    assert events[-1] == RequestEnded(QUEUE, (), "killed_engine")
    assert sum(isinstance(event, RequestEnded) for event in events) == 1
