"""The jobs between claim and commit."""

from __future__ import annotations

from redis import Redis
from rq.executions import Execution
from rq.job import Job
from rq.serializers import JSONSerializer

from shoal_worker.held_jobs import HeldJobs
from shoal_worker.rq_lifecycle import (
    MAX_WORKER_DEATHS,
    Abandoned,
    Claimed,
    Failed,
    GivenBack,
    Succeeded,
)


def claimed(job_id: str, num_requests: object = 1, deaths: int = 0) -> Claimed:
    job = Job.create(
        "f",
        id=job_id,
        connection=Redis(),
        serializer=JSONSerializer,
        meta={"requests": num_requests},
        description="d",
    )
    return Claimed(job, Execution("e", job_id, job.connection), deaths)


def test_an_ended_job_has_one_outcome_and_frees_its_requests() -> None:
    held = HeldJobs()
    held.hold(claimed("a", num_requests=7))
    assert (len(held), held.num_requests) == (1, 7)

    for _ in range(2):
        held.end("a", lambda one: Succeeded(one, 1))

    assert [type(outcome) for outcome in held.outcomes] == [Succeeded]
    assert (len(held), held.num_requests, held.is_empty) == (0, 0, False)


def test_a_dropped_job_gets_no_outcome() -> None:
    held = HeldJobs()
    held.hold(claimed("a"))

    held.drop("a")
    held.end("a", GivenBack)

    assert held.is_empty
    assert held.drop("a") is None


def test_all_jobs_are_given_back_or_refused_in_order() -> None:
    held = HeldJobs()
    held.refuse(claimed("x"), "because")
    held.hold(claimed("a"))
    held.hold(claimed("b"))

    held.give_back_all()

    assert [(type(o), o.claimed.id) for o in held.outcomes] == [
        (Failed, "x"),
        (GivenBack, "a"),
        (GivenBack, "b"),
    ]


def test_a_job_that_died_too_often_is_not_run_again() -> None:
    held = HeldJobs()
    held.hold(claimed("young", deaths=MAX_WORKER_DEATHS - 1))
    held.hold(claimed("old", deaths=MAX_WORKER_DEATHS))

    held.abandon_all()

    assert [type(outcome) for outcome in held.outcomes] == [Abandoned, Failed]


def test_a_job_without_a_count_of_requests_counts_as_one() -> None:
    held = HeldJobs()
    for i, strange in enumerate((None, "many", 0, -3)):
        held.hold(claimed(f"job{i}", num_requests=strange))

    assert held.num_requests == 4
