"""Ends through RQ's functions: what they leave is RQ's, and only a job that is ours ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis
from redis.client import Pipeline
from rq import Callback, Queue, Repeat, Retry, SimpleWorker
from rq.group import Group
from rq.job import Job
from rq.queue import Queue as RQQueue
from rq.rate_limit import RateLimit
from rq.registry import ReadyJobRegistry
from rq.serializers import JSONSerializer
from rq.webhook import Webhook
from tests.rq_content import rq_content

from shoal_worker import rq_fence
from shoal_worker.rq_finish import enqueue_ready, finish_through_rq, needs_rq
from shoal_worker.rq_lifecycle import LEASES_KEY, Lifecycle
from shoal_worker.rq_outcomes import (
    Claimed,
    Failed,
    GivenBack,
    Outcome,
    Room,
    Stopped,
    Succeeded,
)
from shoal_worker.rq_presence import Presence
from shoal_worker.rq_private import RegisteredWorker

calls: list[tuple[str, Any]] = []


def returned(value: Any) -> Any:
    return value


def raised(reason: str) -> None:
    raise ValueError(reason)


def asked_again() -> Retry:
    return Retry(max=2, interval=120)


def noted_success(job: Job, _connection: Any, value: Any) -> None:
    calls.append((job.id, value))


def noted_failure(job: Job, _connection: Any, _type: Any, error: Any, _traceback: Any) -> None:
    calls.append((job.id, str(error)))


def noted_stop(job: Job, _connection: Any) -> None:
    calls.append((job.id, "stopped"))


def saved(job: Job, *_arguments: Any) -> None:
    job.meta["noted"] = True
    job.save()


def broken_callback(*_arguments: Any) -> None:
    raise LookupError("the callback itself")


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    calls.clear()
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def single_try(redis_url: str) -> Iterator[redis.Redis]:
    """A connection that sends nothing a second time, as the worker's."""
    with redis.Redis.from_url(redis_url, retry=None) as client:
        yield client


def queue(connection: redis.Redis, name: str = "q") -> Queue:
    return Queue(name, connection=connection, serializer=JSONSerializer)


def worker(connection: redis.Redis, name: str = "w1") -> RegisteredWorker:
    return RegisteredWorker(["q"], name=name, connection=connection, serializer=JSONSerializer)


def worker_of_both(connection: redis.Redis) -> RegisteredWorker:
    return RegisteredWorker(
        ["q", "other"], name="w2", connection=connection, serializer=JSONSerializer
    )


def claim(registered: RegisteredWorker) -> Claimed:
    [one] = Lifecycle(registered, lease_s=30).claim(Room(1, tokens=1_000_000))
    return one


def lease_removal(claimed: Claimed) -> list[tuple[Any, ...]]:
    return [("ZREM", LEASES_KEY, claimed.execution.composite_key)]


def enqueue(q: Queue, function: Any = returned, *args: Any, **options: Any) -> Job:
    options.setdefault("job_id", "first")
    return q.enqueue(function, *(args or ("x",)), description="d", **options)


def with_dependents(q: Queue, function: Any = returned, **options: Any) -> None:
    first = enqueue(q, function, **options)
    enqueue(q, job_id="then", depends_on=first)
    enqueue(queue(q.connection, "other"), job_id="elsewhere", depends_on=first)


def repeated(q: Queue) -> None:
    enqueue(q, repeat=Repeat(times=3, interval=[120, 240]))


def repeated_at_once(q: Queue) -> None:
    enqueue(q, repeat=Repeat(times=1))


def kept_for_no_time(q: Queue) -> None:
    with_dependents(q, result_ttl=0)


def kept_for_no_time_in_a_group(q: Queue) -> None:
    jobs = [
        Queue.prepare_data(returned, ("x",), job_id=job_id, result_ttl=0, description="d")
        for job_id in ("first", "second")
    ]
    Group.create(q.connection, "g").enqueue_many(q, jobs)


def limited_in_rate(q: Queue) -> None:
    enqueue(q, rate_limit=RateLimit("k", 1))
    enqueue(q, job_id="waits", rate_limit=RateLimit("k", 1))


def returns_a_retry(q: Queue) -> None:
    q.enqueue(asked_again, job_id="first", description="d")


def failed(q: Queue) -> None:
    enqueue(q, raised)


def failed_with_dependents(q: Queue) -> None:
    first = enqueue(q, raised)
    enqueue(q, job_id="then", depends_on=first)
    enqueue(q, job_id="despite", depends_on=first)
    q.connection.hset(Job.key_for("despite"), "allow_dependency_failures", 1)


def retried_at_once(q: Queue) -> None:
    with_dependents(q, raised, retry=Retry(max=2))


def retried_after_a_time(q: Queue) -> None:
    with_dependents(q, raised, retry=Retry(max=2, interval=[120, 240]))


ENDS: list[Callable[[Queue], None]] = [
    with_dependents,
    repeated,
    repeated_at_once,
    kept_for_no_time,
    kept_for_no_time_in_a_group,
    limited_in_rate,
    returns_a_retry,
    failed,
    failed_with_dependents,
    retried_at_once,
    retried_after_a_time,
]
ended_by_all = pytest.mark.parametrize("enqueued", ENDS, ids=lambda end: end.__name__)


def outcome_of(claimed: Claimed) -> Outcome:
    """Run the job, as RQ's worker would."""
    try:
        return Succeeded(claimed, claimed.job.perform())
    except ValueError as error:
        return Failed(claimed, "a traceback", may_retry=True, error=error)


def content_by_rq(connection: redis.Redis, enqueued: Callable[[Queue], None]) -> dict[str, Any]:
    enqueued(queue(connection))
    stock = SimpleWorker(["q"], name="w1", connection=connection, serializer=JSONSerializer)
    stock.work(max_jobs=1, logging_level="CRITICAL")
    content = rq_content(connection)
    connection.flushall()
    return content


@ended_by_all
def test_an_end_leaves_what_rq_s_own_worker_leaves(
    connection: redis.Redis, enqueued: Callable[[Queue], None]
) -> None:
    from_rq = content_by_rq(connection, enqueued)
    enqueued(queue(connection))
    ours = worker(connection)
    claimed = claim(ours)

    assert finish_through_rq(ours, outcome_of(claimed), lease_removal(claimed))

    assert rq_content(connection) == from_rq
    assert not connection.exists(LEASES_KEY)
    assert connection.keys("rq:worker:w1:executions") == []
    counted: Any = connection.hkeys("rq:worker:w1")
    assert set(counted) & {b"successful_job_count", b"failed_job_count"}


def test_a_stopped_job_goes_where_rq_puts_it(connection: redis.Redis) -> None:
    enqueue(queue(connection), raised, retry=Retry(max=2))
    stock = SimpleWorker(["q"], name="w1", connection=connection, serializer=JSONSerializer)
    stock._stopped_job_id = "first"
    stock.work(max_jobs=1, logging_level="CRITICAL")
    from_rq = rq_content(connection)
    connection.flushall()
    enqueue(queue(connection), raised, retry=Retry(max=2))
    ours = worker(connection)

    assert finish_through_rq(ours, Stopped(claim(ours)))

    assert rq_content(connection) == from_rq
    assert connection.hget("rq:job:first", "status") == b"stopped"
    assert connection.zscore("rq:failed:q", "first") is not None


# Between the look at whose the job is and the transaction


def cancelled(connection: redis.Redis) -> None:
    Job.fetch("first", connection=connection, serializer=JSONSerializer).cancel()


def deleted(connection: redis.Redis) -> None:
    Job.fetch("first", connection=connection, serializer=JSONSerializer).delete()


def taken(connection: redis.Redis) -> None:
    [(lease, _score)] = connection.zscan_iter(LEASES_KEY)
    connection.zadd(LEASES_KEY, {lease: 1})
    other = Lifecycle(worker(connection, "w2"), lease_s=30)
    assert len(other.recover()) == 1
    assert len(other.claim(Room(1, tokens=1_000_000))) == 1


def before_each_transaction(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Act once, when the fenced transaction is about to be sent."""
    send = Pipeline._execute_transaction
    acts = [act]

    def sent(self: Pipeline, *args: Any) -> Any:
        if isinstance(self, rq_fence._FencedPipeline) and acts:
            acts.pop()()
        return send(self, *args)

    monkeypatch.setattr(Pipeline, "_execute_transaction", sent)


def after_each_transaction(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Lose the reply of the fenced transaction once."""
    send = Pipeline._execute_transaction
    errors = [error]

    def sent(self: Pipeline, *args: Any) -> Any:
        reply = send(self, *args)
        if isinstance(self, rq_fence._FencedPipeline) and errors:
            self.watching = True  # As it is while the reply is awaited.
            raise errors.pop()
        return reply

    monkeypatch.setattr(Pipeline, "_execute_transaction", sent)


@pytest.mark.parametrize("interfere", [cancelled, deleted, taken])
@ended_by_all
def test_nothing_is_written_for_a_job_that_is_not_ours_any_more(
    connection: redis.Redis,
    enqueued: Callable[[Queue], None],
    interfere: Callable[[redis.Redis], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enqueued(queue(connection))
    ours = worker(connection)
    outcome = outcome_of(claim(ours))
    after: list[dict[str, Any]] = []

    def act() -> None:
        interfere(connection)
        after.append(rq_content(connection))

    before_each_transaction(monkeypatch, act)

    assert not finish_through_rq(ours, outcome, lease_removal(outcome.claimed))

    assert [rq_content(connection)] == after
    assert not connection.hexists("rq:worker:w1", "successful_job_count")
    assert not connection.hexists("rq:worker:w1", "failed_job_count")


@pytest.mark.parametrize("interfere", [cancelled, deleted, taken])
def test_a_job_that_is_not_ours_at_the_start_is_not_touched_and_calls_nothing_back(
    connection: redis.Redis, interfere: Callable[[redis.Redis], None]
) -> None:
    enqueue(queue(connection), on_success=Callback(noted_success))
    ours = worker(connection)
    claimed = claim(ours)
    interfere(connection)
    before = rq_content(connection)

    assert not finish_through_rq(ours, Succeeded(claimed, 1), callbacks=True)

    assert rq_content(connection) == before
    assert calls == []


def test_a_change_that_leaves_the_job_ours_is_no_obstacle(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated(queue(connection))
    ours = worker(connection)
    claimed = claim(ours)
    before_each_transaction(monkeypatch, lambda: connection.hset("rq:job:first", "meta", "{}"))

    assert finish_through_rq(ours, Succeeded(claimed, 1))

    assert connection.hget("rq:job:first", "repeats_left") == b"2"


def test_a_dependent_that_comes_in_between_is_enqueued_too(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    q = queue(connection)
    with_dependents(q)
    ours = worker(connection)
    claimed = claim(ours)
    before_each_transaction(
        monkeypatch,
        lambda: enqueue(q, job_id="late", depends_on=Job("first", connection)),
    )

    assert finish_through_rq(ours, Succeeded(claimed, 1))

    assert sorted(q.job_ids) == ["late", "then"]


# Replies lost, workers killed

HAS_A_RESULT = {with_dependents, repeated, repeated_at_once, limited_in_rate, returns_a_retry} | {
    failed,
    failed_with_dependents,
}


@ended_by_all
def test_an_end_whose_reply_is_lost_is_written_once_and_completed(
    connection: redis.Redis,
    single_try: redis.Redis,
    enqueued: Callable[[Queue], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_rq = content_by_rq(connection, enqueued)
    enqueued(queue(connection))
    ours = worker(single_try)
    outcome = outcome_of(claim(ours))
    after_each_transaction(monkeypatch, redis.ConnectionError("lost"))

    ended = finish_through_rq(ours, outcome)

    # Where nothing is kept that names the execution, nothing tells our end from another's.
    assert ended == (enqueued in HAS_A_RESULT)
    if enqueued is limited_in_rate:  # Its slot is freed by RQ's housekeeping.
        return
    assert rq_content(connection) == from_rq


@ended_by_all
def test_an_end_that_was_not_sent_can_be_tried_again(
    connection: redis.Redis,
    single_try: redis.Redis,
    enqueued: Callable[[Queue], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_rq = content_by_rq(connection, enqueued)
    enqueued(queue(connection))
    ours = worker(single_try)
    outcome = outcome_of(claim(ours))
    with monkeypatch.context() as patched:
        patched.setattr(rq_fence.Fence, "check", _away)
        with pytest.raises(redis.ConnectionError):
            finish_through_rq(ours, outcome)

    assert finish_through_rq(ours, outcome)

    assert rq_content(connection) == from_rq


def _away(*_arguments: Any) -> None:
    raise redis.ConnectionError("away")


@pytest.mark.parametrize("enqueued", [with_dependents, failed_with_dependents, retried_at_once])
def test_an_end_whose_reply_is_lost_and_that_is_tried_again_later_is_written_once(
    connection: redis.Redis,
    single_try: redis.Redis,
    enqueued: Callable[[Queue], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_rq = content_by_rq(connection, enqueued)
    enqueued(queue(connection))
    ours = worker(single_try)
    outcome = outcome_of(claim(ours))
    check, answers = rq_fence.Fence.check, iter([True, False])

    def checked(self: rq_fence.Fence, client: redis.Redis) -> None:
        if not next(answers):
            raise redis.ConnectionError("away for longer")
        check(self, client)

    with monkeypatch.context() as patched:
        after_each_transaction(patched, redis.ConnectionError("lost"))
        patched.setattr(rq_fence.Fence, "check", checked)
        with pytest.raises(redis.ConnectionError):
            finish_through_rq(ours, outcome)

    finish_through_rq(ours, outcome)
    enqueue_ready(worker_of_both(connection))

    assert rq_content(connection) == from_rq


class Killed(BaseException):
    """What no code can catch by accident stands for SIGKILL."""


@ended_by_all
def test_a_worker_killed_before_its_transaction_leaves_the_job_started(
    connection: redis.Redis,
    enqueued: Callable[[Queue], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    enqueued(queue(connection))
    ours = worker(connection)
    outcome = outcome_of(claim(ours))
    before = rq_content(connection)

    def kill() -> None:
        raise Killed

    before_each_transaction(monkeypatch, kill)
    with pytest.raises(Killed):
        finish_through_rq(ours, outcome)

    assert rq_content(connection) == before


@pytest.mark.parametrize("enqueued", [with_dependents, kept_for_no_time, failed_with_dependents])
def test_another_worker_enqueues_what_a_killed_one_left_ready_and_does_so_once(
    connection: redis.Redis,
    enqueued: Callable[[Queue], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from_rq = content_by_rq(connection, enqueued)
    enqueued(queue(connection))
    ours = worker(connection)
    outcome = outcome_of(claim(ours))

    def killed(*_arguments: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(ReadyJobRegistry, "enqueue_jobs", killed)
        with pytest.raises(Killed):
            finish_through_rq(ours, outcome)

    enqueue_ready(worker_of_both(connection))
    enqueue_ready(worker_of_both(connection))

    assert rq_content(connection) == from_rq


def test_the_slot_of_a_job_that_was_cancelled_while_it_ran_is_freed_by_housekeeping(
    connection: redis.Redis,
) -> None:
    limited_in_rate(queue(connection))
    presence = Presence(("q",), "w1", connection)
    life = Lifecycle(presence.worker, lease_s=30)
    [claimed] = life.claim(Room(1, tokens=1_000_000))
    cancelled(connection)
    assert life.commit([Succeeded(claimed, 1)]) == [False]
    assert queue(connection).job_ids == []

    presence.clean_registries()

    assert queue(connection).job_ids == ["waits"]


def test_jobs_that_cannot_be_read_do_not_end_whoever_enqueues_them(
    connection: redis.Redis,
) -> None:
    connection.zadd("rq:ready:q", {"broken": 1})
    connection.hset("rq:job:broken", mapping={"status": "ready_to_enqueue", "created_at": "?"})

    enqueue_ready(worker(connection))


# Callbacks


@pytest.mark.parametrize(
    ("function", "noted"), [(returned, ("first", "x")), (raised, ("first", "x"))]
)
def test_callbacks_run_if_allowed(
    connection: redis.Redis, function: Any, noted: tuple[str, Any]
) -> None:
    options = {"on_success": Callback(noted_success), "on_failure": Callback(noted_failure)}
    enqueue(queue(connection), function, **options)
    ours = worker(connection)
    outcome = outcome_of(claim(ours))

    assert needs_rq(outcome, callbacks=True)
    assert finish_through_rq(ours, outcome, callbacks=True)

    assert calls == [noted]


def test_the_stopped_callback_runs_if_allowed(connection: redis.Redis) -> None:
    enqueue(queue(connection), on_stopped=Callback(noted_stop))
    ours = worker(connection)

    assert finish_through_rq(ours, Stopped(claim(ours)), callbacks=True)

    assert calls == [("first", "stopped")]


@pytest.mark.parametrize("function", [returned, raised])
def test_no_callback_and_no_webhook_goes_out_unless_allowed(
    connection: redis.Redis, function: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Webhook, "send", lambda *_arguments, **_options: calls.append(("", "")))
    enqueue(
        queue(connection),
        function,
        on_success=Callback(noted_success),
        on_failure=Callback(noted_failure),
        webhooks=[Webhook("http://localhost", "finished"), Webhook("http://localhost", "failed")],
    )
    ours = worker(connection)
    outcome = outcome_of(claim(ours))

    assert finish_through_rq(ours, outcome)

    assert calls == []


OUTCOMES: dict[str, Callable[[Claimed], Outcome]] = {
    "succeeded": lambda claimed: Succeeded(claimed, 1),
    "failed": lambda claimed: Failed(claimed, "because"),
    "stopped": Stopped,
}


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_callback_may_save_its_job(connection: redis.Redis, kind: str) -> None:
    enqueue(
        queue(connection),
        on_success=Callback(saved),
        on_failure=Callback(saved),
        on_stopped=Callback(saved),
    )
    ours = worker(connection)
    claimed = claim(ours)

    assert finish_through_rq(ours, OUTCOMES[kind](claimed), callbacks=True)

    job = Job.fetch("first", connection=connection, serializer=JSONSerializer)
    assert job.get_meta() == {"noted": True}
    assert len(job.results()) == 1


@pytest.mark.parametrize("kind", OUTCOMES)
def test_a_broken_callback_does_not_keep_its_job_from_ending(
    connection: redis.Redis, kind: str
) -> None:
    broken = Callback(broken_callback)
    enqueue(queue(connection), on_success=broken, on_failure=broken, on_stopped=broken)
    ours = worker(connection)
    claimed = claim(ours)
    outcome = OUTCOMES[kind](claimed)

    assert finish_through_rq(ours, outcome, callbacks=True)

    latest = claimed.job.latest_result()
    assert latest is not None
    assert ("the callback itself" in str(latest.exc_string)) == (kind != "stopped")
    assert connection.zscore("rq:failed:q", "first") is not None


# What goes this way at all


@pytest.mark.parametrize(
    ("options", "makes_outcome", "needs"),
    [
        ({}, lambda claimed: Succeeded(claimed, 1), False),
        ({"repeat": Repeat(times=1)}, lambda claimed: Succeeded(claimed, 1), True),
        ({"rate_limit": RateLimit("k", 1)}, lambda claimed: Succeeded(claimed, 1), True),
        ({"retry": Retry(max=1)}, lambda claimed: Succeeded(claimed, 1), False),
        ({"retry": Retry(max=1)}, lambda claimed: Failed(claimed, "r", may_retry=True), True),
        ({"retry": Retry(max=1)}, lambda claimed: Failed(claimed, "r"), False),
        ({}, lambda claimed: Failed(claimed, "r", may_retry=True), False),
        ({"on_success": Callback(noted_success)}, lambda claimed: Succeeded(claimed, 1), False),
        ({}, lambda claimed: Failed(claimed, "r", error=ValueError()), True),
        ({"repeat": Repeat(times=1)}, Stopped, False),
        ({"repeat": Repeat(times=1)}, GivenBack, False),
    ],
)
def test_only_ends_that_a_script_cannot_write_go_through_rq(
    connection: redis.Redis,
    options: dict[str, Any],
    makes_outcome: Callable[[Claimed], Outcome],
    needs: bool,
) -> None:
    enqueue(queue(connection), **options)

    assert needs_rq(makes_outcome(claim(worker(connection)))) == needs


def test_a_failure_for_good_spends_no_retry(connection: redis.Redis) -> None:
    retried_at_once(queue(connection))
    ours = worker(connection)

    assert finish_through_rq(ours, Failed(claim(ours), "for good"))

    assert connection.hget("rq:job:first", "status") == b"failed"


def test_a_dependent_that_rq_cannot_read_does_not_keep_a_failed_job_from_ending(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed_with_dependents(queue(connection))
    connection.hset("rq:job:then", "created_at", "?")
    ours = worker(connection)

    assert finish_through_rq(ours, Failed(claim(ours), "because"))

    assert connection.hget("rq:job:first", "status") == b"failed"
    assert RQQueue("q", connection=connection).job_ids == []
