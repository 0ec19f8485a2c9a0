"""The lifecycle against a real server, judged by RQ's own classes and by what is in Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis
from rq import Callback, Queue, Retry, SimpleWorker
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from shoal.jobs import EXPIRIES_KEY
from shoal.wire import FUNCTION_NAME
from shoal_worker.redis_watch import is_away
from shoal_worker.rq_lifecycle import (
    LEASES_KEY,
    MAX_IDS_PER_CLAIM,
    MAX_TTL_S,
    MAX_WORKER_DEATHS,
    Lifecycle,
    refusal,
)
from shoal_worker.rq_outcomes import (
    Claimed,
    DeadLetter,
    Failed,
    GivenBack,
    Room,
    Stopped,
    Succeeded,
    Superseded,
)
from shoal_worker.rq_private import RegisteredWorker


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


def queue(connection: redis.Redis, name: str = "q") -> Queue:
    return Queue(name, connection=connection, serializer=JSONSerializer)


def lifecycle(
    connection: redis.Redis, queues: list[str], name: str = "w1", lease_s: float = 30.0
) -> Lifecycle:
    worker = RegisteredWorker(queues, name=name, connection=connection, serializer=JSONSerializer)
    worker.register_birth()
    return Lifecycle(worker, lease_s=lease_s)


def enqueue(q: Queue, num_requests: int = 1, **options: Any) -> Job:
    meta = {"requests": num_requests}
    return q.enqueue(FUNCTION_NAME, args=({"v": 1},), meta=meta, description="d", **options)


def room(requests: int) -> Room:
    return Room(requests, tokens=1_000_000)


def expire_leases(connection: redis.Redis) -> None:
    for member, _score in connection.zscan_iter(LEASES_KEY):
        connection.zadd(LEASES_KEY, {member: 1})


def test_a_claimed_job_is_started_registered_and_leased_in_one_step(
    connection: redis.Redis,
) -> None:
    job = enqueue(queue(connection))

    [claimed] = lifecycle(connection, ["q"]).claim(room(10))

    job.refresh()
    assert (job.get_status(), job.worker_name) == ("started", "w1")
    assert job.started_at is not None
    assert StartedJobRegistry("q", connection=connection).get_job_ids() == [job.id]
    assert [execution.id for execution in job.get_executions()] == [claimed.execution.id]
    assert connection.zcard(LEASES_KEY) == 1
    assert connection.llen("rq:queue:q") == 0


def test_claims_follow_the_order_of_the_queues_then_of_arrival(connection: redis.Redis) -> None:
    low, high = queue(connection, "low"), queue(connection, "high")
    ids = [enqueue(low).id, enqueue(low).id]
    ids = [enqueue(high).id, *ids]

    claimed = lifecycle(connection, ["high", "low"]).claim(room(10))

    assert [one.id for one in claimed] == ids


def test_capacity_is_counted_in_requests_and_passed_by_one_job_at_most(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    sizes = [3, 3, 3, 3]
    jobs = [enqueue(q, num_requests=size) for size in sizes]

    claimed = lifecycle(connection, ["q"]).claim(room(7))

    assert [one.id for one in claimed] == [job.id for job in jobs[:3]]
    assert q.job_ids == [jobs[3].id]


def test_an_id_that_is_twice_in_the_queue_is_claimed_once(connection: redis.Redis) -> None:
    q = queue(connection)
    job = enqueue(q)
    q.push_job_id(job.id)

    claimed = lifecycle(connection, ["q"]).claim(room(10))

    assert [one.id for one in claimed] == [job.id]
    assert q.job_ids == []


@pytest.mark.parametrize("status", ["created", None])
def test_a_job_that_was_saved_and_pushed_by_hand_is_claimed(
    connection: redis.Redis, status: str | None
) -> None:
    q = queue(connection)
    job = Job.create(FUNCTION_NAME, connection=connection, serializer=JSONSerializer, origin="q")
    job.save()
    if status is None:
        connection.hdel(job.key, "status")
    q.push_job_id(job.id)

    assert [one.id for one in lifecycle(connection, ["q"]).claim(room(10))] == [job.id]


def test_cancelled_and_deleted_jobs_are_not_claimed(connection: redis.Redis) -> None:
    q = queue(connection)
    cancelled, deleted = enqueue(q), enqueue(q)
    cancelled.cancel()
    deleted.delete()
    connection.rpush("rq:queue:q", cancelled.id, deleted.id)

    assert lifecycle(connection, ["q"]).claim(room(10)) == []


def test_a_committed_job_reads_as_finished_through_rq(connection: redis.Redis) -> None:
    q = queue(connection)
    job = enqueue(q, result_ttl=77)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(1))

    assert life.commit([Succeeded(claimed, {"v": 1, "results": []})]) == [True]

    job = Job.fetch(job.id, connection=connection, serializer=JSONSerializer)
    assert job.get_status() == "finished"
    assert job.return_value() == {"v": 1, "results": []}
    assert len(job.results()) == 1
    assert 70 <= connection.ttl(job.key) <= 77
    assert FinishedJobRegistry("q", connection=connection).get_job_ids() == [job.id]
    assert StartedJobRegistry("q", connection=connection).get_job_ids() == []
    assert connection.zcard(LEASES_KEY) == 0
    assert life.worker.get_current_executions(refresh=True) == []


def returned_value(value: dict[str, Any]) -> dict[str, Any]:
    """What the stock worker runs in the comparison below."""
    return value


def redis_content(connection: redis.Redis) -> dict[str, tuple[str, set[bytes], bool]]:
    """Each key's type, the names in it and whether it expires; values and ids differ by nature."""
    content = {}
    for key in connection.scan_iter():
        kind = connection.type(key).decode()  # type: ignore[union-attr]
        names: set[bytes] = set()
        if kind == "hash":
            names = set(connection.hkeys(key))  # type: ignore[arg-type]
        elif kind == "stream":
            entries: Any = connection.xrange(key)
            names = set(entries[0][1])
        content[key.decode()] = (kind, names, connection.ttl(key) > 0)
    return content


def test_a_commit_leaves_the_same_keys_and_fields_as_rq_s_own_worker(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    q.enqueue(returned_value, {"v": 1}, job_id="same", result_ttl=60, description="d")
    stock = SimpleWorker([q], name="w1", connection=connection, serializer=JSONSerializer)
    stock.work(burst=True)
    from_rq = redis_content(connection)
    connection.flushall()
    q.enqueue(returned_value, {"v": 1}, job_id="same", result_ttl=60, description="d")
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(1))

    life.commit([Succeeded(claimed, {"v": 1})])
    life.worker.register_death()

    ours = redis_content(connection)
    # Ours alone: a later question hears when the result went, a lost reply is given again.
    del ours[EXPIRIES_KEY], ours["rq:shoal:answers:w1"], ours["rq:shoal:not-full"]
    only_while_working = {"rq:clean_registries:q", "rq:clean_groups"}
    assert ours.keys() == from_rq.keys() - only_while_working
    for key, content in ours.items():
        if key != "rq:worker:w1":
            assert content == from_rq[key], key


def test_a_failed_job_is_in_the_failed_registry_with_its_reason(connection: redis.Redis) -> None:
    job = enqueue(queue(connection))
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(1))

    assert life.commit([Failed(claimed, "because")]) == [True]

    job.refresh()
    assert job.get_status() == "failed"
    assert FailedJobRegistry("q", connection=connection).get_job_ids() == [job.id]
    latest = job.latest_result()
    assert latest is not None
    assert latest.exc_string == "because"


def test_a_job_that_may_wait_only_so_long_may_do_so_again_when_it_comes_back(
    connection: redis.Redis,
) -> None:
    job = enqueue(queue(connection), ttl=1_000)
    life = lifecycle(connection, ["q"])

    [claimed] = life.claim(room(10))
    assert connection.ttl(job.key) == -1
    life.commit([GivenBack(claimed)])
    assert 0 < connection.ttl(job.key) <= 1_000

    life.claim(room(10))
    expire_leases(connection)
    life.recover()
    assert 0 < connection.ttl(job.key) <= 1_000


def test_a_job_given_back_is_first_in_its_queue_and_spends_no_retry(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    first = enqueue(q, retry=Retry(max=3))
    second = enqueue(q)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(1))

    assert life.commit([GivenBack(claimed)]) == [True]

    assert q.job_ids == [first.id, second.id]
    first.refresh()
    assert (first.get_status(), first.retries_left, first.worker_name) == ("queued", 3, None)
    assert connection.zcard(LEASES_KEY) == 0
    assert len(life.claim(room(5))) == 2


def claim_one(connection: redis.Redis, life: Lifecycle) -> Claimed:
    enqueue(queue(connection))
    [claimed] = life.claim(room(1))
    return claimed


def test_a_zombie_s_result_is_refused_and_the_second_worker_s_is_the_only_one(
    connection: redis.Redis,
) -> None:
    zombie, second = lifecycle(connection, ["q"], "zombie"), lifecycle(connection, ["q"], "second")
    claimed = claim_one(connection, zombie)
    expire_leases(connection)
    assert [one.failed for one in second.recover()] == [False]
    [again] = second.claim(room(1))

    assert zombie.commit([Succeeded(claimed, 1)]) == [False]
    assert second.commit([Succeeded(again, 2)]) == [True]
    assert zombie.commit([Succeeded(claimed, 3)]) == [False]

    job = Job.fetch(claimed.id, connection=connection, serializer=JSONSerializer)
    assert [result.return_value for result in job.results()] == [2]


def test_a_late_worker_whose_job_nobody_took_may_still_commit(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)
    expire_leases(connection)

    assert life.commit([Succeeded(claimed, 1)]) == [True]


def test_cancelled_stays_cancelled_and_deleted_stays_deleted(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    cancelled, deleted = claim_one(connection, life), claim_one(connection, life)
    Job.fetch(cancelled.id, connection=connection, serializer=JSONSerializer).cancel()
    Job.fetch(deleted.id, connection=connection, serializer=JSONSerializer).delete()

    assert life.commit([Succeeded(cancelled, 1), Succeeded(deleted, 1)]) == [False, False]

    job = Job.fetch(cancelled.id, connection=connection, serializer=JSONSerializer)
    assert (job.get_status(), job.results()) == ("canceled", [])
    assert not Job.exists(deleted.id, connection=connection)
    assert not connection.exists(f"rq:results:{deleted.id}")


def test_a_renewal_keeps_the_lease_and_tells_of_cancellations(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    held, cancelled, lost = (claim_one(connection, life) for _ in range(3))
    Job.fetch(cancelled.id, connection=connection, serializer=JSONSerializer).cancel()
    connection.hset(f"rq:job:{lost.id}", "worker_name", "other")
    connection.sadd(f"rq:shoal:cancel:{held.id}", 3)
    expire_leases(connection)

    renewals = life.renew([held, cancelled, lost])

    assert [renewal.state for renewal in renewals] == ["held", "cancelled", "lost"]
    assert renewals[0].cancelled_requests == {3}
    leases: Any = connection.zrange(LEASES_KEY, 0, -1, withscores=True)
    [(member, score)] = leases
    assert member.decode().startswith(held.id)
    assert score > time.time() + 20


def test_looking_for_cancellations_leaves_the_leases_as_they_are(
    connection: redis.Redis,
) -> None:
    life = lifecycle(connection, ["q"])
    held, cancelled = claim_one(connection, life), claim_one(connection, life)
    Job.fetch(cancelled.id, connection=connection, serializer=JSONSerializer).cancel()
    before: Any = connection.zscore(LEASES_KEY, held.execution.composite_key)

    renewals = life.renew([held, cancelled], only_look=True)

    assert [renewal.state for renewal in renewals] == ["held", "cancelled"]
    assert connection.zscore(LEASES_KEY, held.execution.composite_key) == before


def test_rq_info_s_cleanup_reaps_no_held_job(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)

    assert StartedJobRegistry("q", connection=connection).count == 1
    in_half_an_hour = time.time() + 1800
    StartedJobRegistry("q", connection=connection).cleanup(in_half_an_hour)

    assert life.commit([Succeeded(claimed, 1)]) == [True]


def test_a_job_that_keeps_losing_its_worker_ends_in_the_failed_registry(
    connection: redis.Redis,
) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)
    for _ in range(MAX_WORKER_DEATHS):
        expire_leases(connection)
        assert [one.failed for one in life.recover()] == [False]
        life.renew(life.claim(room(1)))
    expire_leases(connection)

    assert [one.failed for one in life.recover()] == [True]

    assert not connection.hexists(f"rq:job:{claimed.id}", "shoal_deaths")
    job = Job.fetch(claimed.id, connection=connection, serializer=JSONSerializer)
    assert job.get_status() == "failed"
    assert connection.zcard(LEASES_KEY) == 0
    assert "lost its worker 6 times" in str(job.latest_result().exc_string)  # type: ignore[union-attr]


def test_a_job_that_never_ran_is_not_charged_with_its_workers_deaths(
    connection: redis.Redis,
) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)
    for _ in range(3 * MAX_WORKER_DEATHS):
        expire_leases(connection)
        assert [one.failed for one in life.recover()] == [False]
        [again] = life.claim(room(1))
        life.renew([again], waiting=frozenset({claimed.id}))

    assert again.deaths == 2


def test_deaths_of_over_an_hour_ago_are_forgotten(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)
    long_ago: Any = {"shoal_deaths": MAX_WORKER_DEATHS, "shoal_died_at": time.time() - 3_700}
    connection.hset(claimed.job.key, mapping=long_ago)
    expire_leases(connection)

    assert [one.failed for one in life.recover()] == [False]

    assert [one.deaths for one in life.claim(room(1))] == [1]


def test_recovered_jobs_are_in_the_order_of_their_submission(connection: redis.Redis) -> None:
    q = queue(connection)
    ids = [enqueue(q).id for _ in range(5)]
    life = lifecycle(connection, ["q"])
    life.claim(room(4))
    expire_leases(connection)

    life.recover()

    assert q.job_ids == ids


def test_a_claim_whose_reply_was_lost_is_answered_again(connection: redis.Redis) -> None:
    q = queue(connection)
    ids = [enqueue(q).id for _ in range(3)]
    life = lifecycle(connection, ["q"])
    with lost_reply(life, "_claim"), pytest.raises(redis.ConnectionError):
        life.claim(room(2))

    assert {one.id for one in life.take_unanswered()} == set(ids[:2])
    assert life.take_unanswered() == []

    assert q.job_ids == ids[2:]
    assert [one.id for one in life.claim(room(2))] == ids[2:]


def test_a_commit_whose_reply_was_lost_is_answered_again(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    outcomes = [Succeeded(claim_one(connection, life), i) for i in range(2)]
    connection.hset(outcomes[1].claimed.job.key, "worker_name", "other")
    with lost_reply(life, "_commit"), pytest.raises(redis.ConnectionError):
        life.commit(outcomes)

    assert life.commit(outcomes) == [True, False]

    job = Job.fetch(outcomes[0].claimed.id, connection=connection, serializer=JSONSerializer)
    assert len(job.results()) == 1


@contextmanager
def lost_reply(life: Lifecycle, script: str) -> Iterator[None]:
    """The script runs; its answer does not arrive."""
    run = getattr(life, script)

    def lose(**arguments: Any) -> None:
        run(**arguments)
        raise redis.ConnectionError

    setattr(life, script, lose)
    yield
    setattr(life, script, run)


def test_large_commits_go_in_several_requests(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal_worker.rq_lifecycle.MAX_COMMIT_BYTES", 25_000)
    life = lifecycle(connection, ["q"])
    outcomes = [Succeeded(claim_one(connection, life), "x" * 3_000) for _ in range(6)]
    num_committed = []
    while outcomes:
        committed = life.commit(outcomes)
        assert all(committed)
        del outcomes[: len(committed)]
        num_committed.append(len(committed))

    assert sum(num_committed) == 6
    assert 1 < len(num_committed) < 6


def test_a_result_that_redis_would_refuse_fails_its_job(
    connection: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shoal_worker.rq_lifecycle.MAX_RESULT_BYTES", 1_000)
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)

    assert life.commit([Succeeded(claimed, "x" * 2_000)]) == [True]

    job = Job.fetch(claimed.id, connection=connection, serializer=JSONSerializer)
    assert job.get_status() == "failed"
    assert "a result may have 1000" in str(job.latest_result().exc_string)  # type: ignore[union-attr]


def test_a_part_of_the_room_is_kept_for_the_first_queue(connection: redis.Redis) -> None:
    low = [enqueue(queue(connection, "low")).id for _ in range(4)]
    life = lifecycle(connection, ["high", "low"])

    assert [one.id for one in life.claim(Room(3, 1_000, reserved=2))] == low[:1]
    high = [enqueue(queue(connection, "high")).id for _ in range(2)]
    # Both the requests and the tokens may have been passed by a large job of the others.
    assert [one.id for one in life.claim(Room(-60, -9, reserved=2))] == high


def test_tokens_count_against_the_room_too(connection: redis.Redis) -> None:
    q = queue(connection)
    for _ in range(3):
        q.enqueue(FUNCTION_NAME, {"v": 1}, meta={"requests": 1, "tokens": 600}, description="d")

    claimed = lifecycle(connection, ["q"]).claim(Room(100, tokens=1_000))

    assert [(one.requests, one.tokens) for one in claimed] == [(1, 600), (1, 600)]


@pytest.mark.parametrize("num_requests", [0, -5, 1e300, "many", None, [3], True])
def test_a_strange_number_of_requests_counts_as_one(
    connection: redis.Redis, num_requests: object
) -> None:
    q = queue(connection)
    for _ in range(3):
        q.enqueue(FUNCTION_NAME, {"v": 1}, meta={"requests": num_requests}, description="d")

    assert [one.requests for one in lifecycle(connection, ["q"]).claim(room(2))] == [1, 1]


def test_a_job_bound_to_another_fingerprint_is_left_where_it_is(connection: redis.Redis) -> None:
    q = queue(connection)
    jobs = [
        q.enqueue(FUNCTION_NAME, {"v": 1}, meta={"fingerprint": name}, description="d")
        for name in ("theirs", "ours", "theirs", "ours")
    ]
    life = lifecycle(connection, ["q"])

    assert [one.id for one in life.claim(room(9), "ours")] == [jobs[1].id, jobs[3].id]

    assert q.job_ids == [jobs[0].id, jobs[2].id]
    assert jobs[0].get_status() == "queued"


def test_jobs_behind_very_many_that_are_bound_elsewhere_are_found(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    jobs = [Queue.prepare_data(FUNCTION_NAME, job_id=f"b{i}") for i in range(MAX_IDS_PER_CLAIM + 9)]
    with connection.pipeline() as pipeline:
        for bound in q.enqueue_many(jobs, pipeline=pipeline):
            pipeline.hset(bound.key, "meta", '{"fingerprint": "another"}')
        pipeline.execute()
    free = enqueue(q)
    before = q.job_ids
    ours = lifecycle(connection, ["q"])

    assert ours.claim(room(1), "ours") == []
    assert not ours.saw_nothing
    assert [one.id for one in ours.claim(room(1), "ours")] == [free.id]
    assert q.job_ids == [job_id for job_id in before if job_id != free.id]
    at_front = enqueue(q, at_front=True)
    assert [one.id for one in ours.claim(room(1), "ours")] == [at_front.id]
    claims = [ours.claim(room(1), "ours") for _ in range(2)]
    assert (claims, ours.saw_nothing) == ([[], []], True)


def test_what_is_no_job_is_dropped_from_the_queue(connection: redis.Redis) -> None:
    q = queue(connection)
    connection.rpush("rq:queue:q", "nothing", "a list", b"\xff\xfe")
    connection.rpush("rq:job:a list", "x")
    job = enqueue(q)

    assert [one.id for one in lifecycle(connection, ["q"]).claim(room(9))] == [job.id]


@pytest.mark.parametrize("job_id", ["a.b", b"\xff\xfe", "a:b"])
def test_a_job_whose_id_rq_refuses_is_failed_and_its_neighbours_run(
    connection: redis.Redis, job_id: Any
) -> None:
    q = queue(connection)
    fine = enqueue(q)
    key = b"rq:job:" + (job_id if isinstance(job_id, bytes) else job_id.encode())
    connection.copy(fine.key, key)  # type: ignore[arg-type]
    connection.lpush("rq:queue:q", job_id)
    life = lifecycle(connection, ["q"])

    assert [one.id for one in life.claim(room(9))] == [fine.id]

    assert connection.hget(key, "status") == b"failed"
    assert connection.zscore("rq:failed:q", job_id) is not None
    assert connection.zcard(LEASES_KEY) == 1


def test_a_stopped_job_is_where_rq_puts_it(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)

    assert life.commit([Stopped(claimed)]) == [True]

    job = Job.fetch(claimed.id, connection=connection, serializer=JSONSerializer)
    assert job.get_status() == "stopped"
    assert FailedJobRegistry("q", connection=connection).get_job_ids() == [job.id]


def test_a_dead_letter_is_a_failed_job_that_can_be_requeued(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    claimed = claim_one(connection, life)
    letter = DeadLetter(f"{claimed.id}-3", {"v": 1, "requests": ["it"]}, "it kills")

    assert life.commit([Succeeded(claimed, 1, (letter,))]) == [True]

    dead = Job.fetch(letter.job_id, connection=connection, serializer=JSONSerializer)
    assert (dead.get_status(), dead.func_name) == ("failed", FUNCTION_NAME)
    assert dead.latest_result().exc_string == "it kills"  # type: ignore[union-attr]
    assert FailedJobRegistry("q", connection=connection).get_job_ids() == [dead.id]
    dead.requeue()
    [again] = life.claim(room(9))
    assert again.job.args == (letter.argument,) or again.job.args == [letter.argument]


def test_a_job_that_is_not_ours_any_more_leaves_nothing_of_us_behind(
    connection: redis.Redis,
) -> None:
    life = lifecycle(connection, ["q"])
    cancelled, lost = claim_one(connection, life), claim_one(connection, life)
    Job.fetch(cancelled.id, connection=connection, serializer=JSONSerializer).cancel()
    connection.hset(lost.job.key, "worker_name", "other")

    life.renew([cancelled])
    life.commit([Succeeded(lost, 1)])

    assert connection.keys("rq:execution*") == []
    assert connection.smembers("rq:worker:w1:executions") == set()
    assert connection.zcard("rq:wip:q") == 0
    assert 0 < connection.ttl(cancelled.job.key) <= 86_400


def test_a_job_that_rq_cancels_just_before_its_commit_does_not_stay_for_ever(
    connection: redis.Redis,
) -> None:
    job = enqueue(queue(connection))
    ours = lifecycle(connection, ["q"])
    [claimed] = ours.claim(room(1))
    job.cancel()

    assert ours.commit([Succeeded(claimed, 1)]) == [False]

    assert job.get_status() == "canceled"
    assert connection.ttl(job.key) > 0


def test_a_job_requeued_under_us_and_claimed_again_has_one_execution(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    job = enqueue(q)
    ours = lifecycle(connection, ["q"])
    [first] = ours.claim(room(1))
    job.cancel()
    q.enqueue_job(job)
    [second] = ours.claim(room(1))

    assert ours.commit([Superseded(first)]) == [False]

    held = connection.smembers(f"rq:worker:{ours.worker.name}:executions")
    assert held == {second.execution.composite_key.encode()}
    assert connection.zrange(LEASES_KEY, 0, -1) == list(held)
    assert ours.commit([Succeeded(second, 1)]) == [True]


def test_a_full_redis_is_neither_claimed_from_nor_recovered_in(connection: redis.Redis) -> None:
    q = queue(connection)
    life = lifecycle(connection, ["q"])
    held, waits = claim_one(connection, life), enqueue(q)
    expire_leases(connection)
    connection.config_set("maxmemory", 1)
    try:
        for attempt in (lambda: life.claim(room(1)), life.recover):
            with pytest.raises(redis.RedisError) as caught:
                attempt()
            assert is_away(caught.value)
    finally:
        connection.config_set("maxmemory", 0)

    assert q.job_ids == [waits.id]
    assert held.job.get_status() == "started"


def test_recovery_leaves_living_leases_alone(connection: redis.Redis) -> None:
    life = lifecycle(connection, ["q"])
    claim_one(connection, life)

    assert life.recover() == []


def test_a_job_that_rq_cannot_read_is_failed_and_its_neighbours_run(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    broken, fine = enqueue(q), enqueue(q)
    connection.hdel(broken.key, "data")
    life = lifecycle(connection, ["q"])

    assert [one.id for one in life.claim(room(10))] == [fine.id]

    assert connection.hget(broken.key, "status") == b"failed"
    assert connection.zscore("rq:failed:q", broken.id) is not None
    members: Any = connection.zrange("rq:wip:q", 0, -1)
    assert [member.decode().split(":")[0] for member in members] == [fine.id]
    assert connection.zcard(LEASES_KEY) == 1


def test_a_job_moved_here_from_another_queue_keeps_its_own_registries(
    connection: redis.Redis,
) -> None:
    job = enqueue(queue(connection, "elsewhere"))
    connection.delete("rq:queue:elsewhere")
    connection.rpush("rq:queue:q", job.id)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(1))

    assert life.commit([Succeeded(claimed, 1)]) == [True]

    finished = FinishedJobRegistry("elsewhere", connection=connection)
    assert finished.get_job_ids() == [job.id]


@pytest.mark.parametrize(("result_ttl", "is_kept"), [(0, False), (-1, True)])
def test_a_result_is_kept_as_long_as_its_job_asks(
    connection: redis.Redis, result_ttl: int, is_kept: bool
) -> None:
    job = enqueue(queue(connection), result_ttl=result_ttl)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(1))

    assert life.commit([Succeeded(claimed, 1)]) == [True]

    assert bool(connection.exists(job.key)) == is_kept
    assert bool(connection.exists(f"rq:results:{job.id}")) == is_kept
    assert connection.ttl(job.key) == (-1 if is_kept else -2)
    assert connection.keys("rq:execution*") == []
    assert connection.zcard("rq:wip:q") == 0


def test_a_job_that_rq_cannot_finish_is_failed_and_its_neighbours_end(
    connection: redis.Redis,
) -> None:
    """RQ looks up the group of a job whose result is not kept."""
    q = queue(connection)
    broken, fine = enqueue(q, result_ttl=0), enqueue(q)
    connection.hset(broken.key, "group_id", "gone")
    life = lifecycle(connection, ["q"])
    claimed = life.claim(room(10))

    assert life.commit([Succeeded(one, 1) for one in claimed]) == [True, True]

    assert connection.hget(broken.key, "status") == b"failed"
    assert "NoSuchGroupError" in str(broken.latest_result().exc_string)  # type: ignore[union-attr]
    assert connection.hget(fine.key, "status") == b"finished"


def test_a_job_that_rq_cannot_even_fail_does_not_keep_others_from_ending(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    jobs = [enqueue(q, failure_ttl=0), enqueue(q)]
    ours = lifecycle(connection, ["q"])
    claimed = ours.claim(room(10))
    connection.delete(jobs[0].key)  # RQ asks for its status, to forget it.

    answers = ours.commit([Failed(claimed[0], "bad"), Succeeded(claimed[1], 1)])

    assert answers == [False, True]
    assert jobs[1].get_status() == "finished"


@pytest.mark.parametrize("field", ["result_ttl", "failure_ttl"])
def test_a_ttl_that_redis_would_refuse_fails_its_job_and_no_other(
    connection: redis.Redis, field: str
) -> None:
    q = queue(connection)
    jobs = [enqueue(q), enqueue(q)]
    connection.hset(jobs[0].key, field, MAX_TTL_S * 10**10)
    ours = lifecycle(connection, ["q"])

    [claimed] = ours.claim(room(10))

    assert ours.commit([Succeeded(claimed, 1)]) == [True]
    assert [job.get_status() for job in jobs] == ["failed", "finished"]


def test_dependents_run_after_their_job(connection: redis.Redis) -> None:
    q = queue(connection)
    first = enqueue(q)
    then = enqueue(q, depends_on=first)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(room(5))

    life.commit([Succeeded(claimed, 1)])

    assert q.job_ids == [then.id]


@pytest.mark.parametrize(
    ("function", "options", "reason"),
    [
        ("subprocess.check_call", {}, "runs shoal.generate and nothing else"),
        (FUNCTION_NAME, {"on_success": "os.abort"}, "callbacks and webhooks are refused"),
    ],
)
def test_a_job_that_would_have_us_run_a_name_is_refused(
    connection: redis.Redis, function: str, options: dict[str, Any], reason: str
) -> None:
    callbacks = {name: Callback(value) for name, value in options.items()}
    queue(connection).enqueue(function, args=(["x"],), description="d", **callbacks)
    [claimed] = lifecycle(connection, ["q"]).claim(room(1))

    assert reason in str(refusal(claimed, FUNCTION_NAME))


def test_a_pickled_job_is_refused_without_being_unpickled(connection: redis.Redis) -> None:
    Queue("q", connection=connection).enqueue(FUNCTION_NAME, {"v": 1}, description="d")
    [claimed] = lifecycle(connection, ["q"]).claim(room(1))

    assert "not JSON" in str(refusal(claimed, FUNCTION_NAME))
