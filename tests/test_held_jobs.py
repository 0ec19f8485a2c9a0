"""The jobs between claim and commit."""

from __future__ import annotations

from redis import Redis
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from shoal_worker.held_jobs import HeldJobs
from shoal_worker.rq_outcomes import (
    Claimed,
    DeadLetter,
    Failed,
    GivenBack,
    Succeeded,
    Superseded,
)


def claimed(job_id: str, num_requests: int = 1, num_tokens: int = 0) -> Claimed:
    argument = {"v": 1, "requests": [{"prompt": "p"}] * num_requests}
    job = Job.create(
        "f",
        id=job_id,
        args=(argument,),
        connection=Redis(),
        serializer=JSONSerializer,
        description="d",
    )
    execution = Execution("e", job_id, job.connection)
    return Claimed(job, execution, num_requests, num_tokens)


def test_an_ended_job_has_one_outcome_and_frees_its_requests() -> None:
    held = HeldJobs()
    held.hold(claimed("a", num_requests=7))
    assert (len(held), held.num_requests, held.num_open) == (1, 7, 7)

    for _ in range(2):
        held.end("a", lambda one: Succeeded(one, 1))

    assert [type(outcome) for outcome in held.to_commit()] == [Succeeded]
    assert (len(held), held.num_requests, held.is_empty) == (0, 0, False)


def test_a_job_that_is_claimed_again_ends_its_first_execution_alone() -> None:
    held = HeldJobs()
    first, second = claimed("a", num_requests=2), claimed("a", num_requests=2)
    second.execution.id = "another"

    held.hold(first)
    held.hold(second)

    assert held.to_commit() == [Superseded(first)]
    assert (held.runs(first), held.runs(second)) == (False, True)
    assert (len(held), held.num_requests) == (1, 2)


def test_a_dropped_job_gets_no_outcome() -> None:
    held = HeldJobs()
    held.hold(claimed("a"))

    held.drop("a")
    held.end("a", GivenBack)

    assert held.is_empty
    assert held.drop("a") is None


def test_all_jobs_go_back_the_last_one_first_so_that_the_queue_keeps_its_order() -> None:
    held = HeldJobs()
    held.refuse(claimed("x"), "because")
    held.hold(claimed("a"))
    held.hold(claimed("b"))

    held.give_back_all()

    assert [(type(o), o.claimed.id) for o in held.to_commit()] == [
        (Failed, "x"),
        (GivenBack, "b"),
        (GivenBack, "a"),
    ]


def test_a_job_held_twice_counts_once() -> None:
    held = HeldJobs()
    held.hold(claimed("a", num_requests=7, num_tokens=70))

    held.hold(claimed("a", num_requests=7, num_tokens=70))

    assert (len(held), held.num_open, held.num_open_tokens) == (1, 7, 70)


def test_room_is_free_again_as_requests_end_not_only_whole_jobs() -> None:
    held = HeldJobs()
    held.hold(claimed("a", num_requests=10, num_tokens=1000))
    held.hold(claimed("b", num_requests=2, num_tokens=50))

    held.request_ended("a", 3)
    held.request_ended("a", 0)  # An error has no completions, and was one all the same.
    held.request_ended("nobody's", 1)

    assert (held.num_requests, held.num_open, held.num_open_tokens) == (12, 8, 650)
    held.drop("a")
    assert (held.num_requests, held.num_open, held.num_open_tokens) == (2, 2, 50)


def test_a_held_job_keeps_room_for_its_last_request_however_often_ends_are_told() -> None:
    held = HeldJobs()
    held.hold(claimed("a", num_requests=3, num_tokens=9))

    for _ in range(5):
        held.request_ended("a", 2)

    assert (held.num_open, held.num_open_tokens) == (1, 3)


def test_what_had_ended_in_an_engine_that_died_needs_room_again() -> None:
    held = HeldJobs()
    held.hold(claimed("a", num_requests=3, num_tokens=9))
    held.hold(claimed("b", num_requests=1, num_tokens=1))
    held.answer_part("a", {2: {}})
    held.request_ended("a", 1)
    held.request_ended("a", 1)

    held.begin_again()

    assert (held.num_open, held.num_open_tokens) == (3, 7)


def test_what_is_to_be_committed_stays_the_same_until_it_is() -> None:
    held = HeldJobs()
    held.refuse(claimed("a"), "because")
    held.refuse(claimed("b"), "because")
    first = list(held.to_commit())
    held.refuse(claimed("c"), "because")

    assert held.to_commit() == first

    held.committed(1)
    assert [outcome.claimed.id for outcome in held.to_commit()] == ["b"]
    held.committed(1)
    assert [outcome.claimed.id for outcome in held.to_commit()] == ["c"]
    assert not held.is_empty
    held.committed(1)
    assert held.is_empty


def test_a_job_whose_requests_ran_apart_ends_with_its_last_one() -> None:
    held = HeldJobs()
    letter = DeadLetter("a-1", {}, "because")
    held.hold(claimed("a", num_requests=3)).dead_letters.append(letter)

    held.answer_part("a", {2: "C", 1: "B"})
    assert held.to_commit() == []
    held.answer_part("a", {0: "A"})

    [outcome] = held.to_commit()
    assert isinstance(outcome, Succeeded)
    assert outcome.return_value == {"v": 1, "results": ["A", "B", "C"]}
    assert [letter.job_id for letter in outcome.dead_letters] == ["a-1"]
    held.answer_part("a", {0: "A"})


def test_the_lease_of_what_is_not_committed_yet_is_kept() -> None:
    held = HeldJobs()
    held.hold(claimed("a"))
    held.refuse(claimed("b"), "because")
    held.to_commit()
    held.refuse(claimed("c"), "because")

    assert {one.id for one in held.leased()} == {"a", "b", "c"}
