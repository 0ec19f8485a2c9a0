"""The lifecycle against a real server, judged by RQ's own classes and by what is in Redis."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
import redis
from rq import Callback, Queue, Retry, SimpleWorker
from rq.job import Job
from rq.registry import FailedJobRegistry, FinishedJobRegistry, StartedJobRegistry
from rq.serializers import JSONSerializer

from shoal.jobs import EXPIRIES_KEY
from shoal.wire import FUNCTION_NAME
from shoal_worker.rq_lifecycle import (
    LEASES_KEY,
    MAX_WORKER_DEATHS,
    Claimed,
    Failed,
    GivenBack,
    Lifecycle,
    Succeeded,
    refusal,
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


def expire_leases(connection: redis.Redis) -> None:
    for member, _score in connection.zscan_iter(LEASES_KEY):
        connection.zadd(LEASES_KEY, {member: 1})


def test_a_claimed_job_is_started_registered_and_leased_in_one_step(
    connection: redis.Redis,
) -> None:
    job = enqueue(queue(connection))

    [claimed] = lifecycle(connection, ["q"]).claim(10)

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

    claimed = lifecycle(connection, ["high", "low"]).claim(10)

    assert [one.id for one in claimed] == ids


def test_capacity_is_counted_in_requests_and_passed_by_one_job_at_most(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    sizes = [3, 3, 3, 3]
    jobs = [enqueue(q, num_requests=size) for size in sizes]

    claimed = lifecycle(connection, ["q"]).claim(7)

    assert [one.id for one in claimed] == [job.id for job in jobs[:3]]
    assert q.job_ids == [jobs[3].id]


def test_an_id_that_is_twice_in_the_queue_is_claimed_once(connection: redis.Redis) -> None:
    q = queue(connection)
    job = enqueue(q)
    q.push_job_id(job.id)

    claimed = lifecycle(connection, ["q"]).claim(10)

    assert [one.id for one in claimed] == [job.id]
    assert q.job_ids == []


def test_cancelled_and_deleted_jobs_are_not_claimed(connection: redis.Redis) -> None:
    q = queue(connection)
    cancelled, deleted = enqueue(q), enqueue(q)
    cancelled.cancel()
    deleted.delete()
    connection.rpush("rq:queue:q", cancelled.id, deleted.id)

    assert lifecycle(connection, ["q"]).claim(10) == []


def test_a_committed_job_reads_as_finished_through_rq(connection: redis.Redis) -> None:
    q = queue(connection)
    job = enqueue(q, result_ttl=77)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(1)

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
    [claimed] = life.claim(1)

    life.commit([Succeeded(claimed, {"v": 1})])
    life.worker.register_death()

    ours = redis_content(connection)
    del ours[EXPIRIES_KEY]  # Ours alone: a later question hears when the result went.
    only_while_working = {"rq:clean_registries:q", "rq:clean_groups"}
    assert ours.keys() == from_rq.keys() - only_while_working
    for key, content in ours.items():
        if key != "rq:worker:w1":
            assert content == from_rq[key], key


def test_a_failed_job_is_in_the_failed_registry_with_its_reason(connection: redis.Redis) -> None:
    job = enqueue(queue(connection))
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(1)

    assert life.commit([Failed(claimed, "because")]) == [True]

    job.refresh()
    assert job.get_status() == "failed"
    assert FailedJobRegistry("q", connection=connection).get_job_ids() == [job.id]
    latest = job.latest_result()
    assert latest is not None
    assert latest.exc_string == "because"


def test_a_job_given_back_is_first_in_its_queue_and_spends_no_retry(
    connection: redis.Redis,
) -> None:
    q = queue(connection)
    first = enqueue(q, retry=Retry(max=3))
    second = enqueue(q)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(1)

    assert life.commit([GivenBack(claimed)]) == [True]

    assert q.job_ids == [first.id, second.id]
    first.refresh()
    assert (first.get_status(), first.retries_left, first.worker_name) == ("queued", 3, None)
    assert connection.zcard(LEASES_KEY) == 0
    assert len(life.claim(5)) == 2


def claim_one(connection: redis.Redis, life: Lifecycle) -> Claimed:
    enqueue(queue(connection))
    [claimed] = life.claim(1)
    return claimed


def test_a_zombie_s_result_is_refused_and_the_second_worker_s_is_the_only_one(
    connection: redis.Redis,
) -> None:
    zombie, second = lifecycle(connection, ["q"], "zombie"), lifecycle(connection, ["q"], "second")
    claimed = claim_one(connection, zombie)
    expire_leases(connection)
    assert [one.failed for one in second.recover()] == [False]
    [again] = second.claim(1)

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
        life.claim(1)
    expire_leases(connection)

    assert [one.failed for one in life.recover()] == [True]

    job = Job.fetch(claimed.id, connection=connection, serializer=JSONSerializer)
    assert job.get_status() == "failed"
    assert connection.zcard(LEASES_KEY) == 0
    assert "died" in str(job.latest_result().exc_string)  # type: ignore[union-attr]


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

    assert [one.id for one in life.claim(10)] == [fine.id]

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
    [claimed] = life.claim(1)

    assert life.commit([Succeeded(claimed, 1)]) == [True]

    finished = FinishedJobRegistry("elsewhere", connection=connection)
    assert finished.get_job_ids() == [job.id]


@pytest.mark.parametrize(("result_ttl", "is_kept"), [(0, False), (-1, True)])
def test_a_result_is_kept_as_long_as_its_job_asks(
    connection: redis.Redis, result_ttl: int, is_kept: bool
) -> None:
    job = enqueue(queue(connection), result_ttl=result_ttl)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(1)

    assert life.commit([Succeeded(claimed, 1)]) == [True]

    assert bool(connection.exists(job.key)) == is_kept
    assert bool(connection.exists(f"rq:results:{job.id}")) == is_kept
    assert connection.ttl(job.key) == (-1 if is_kept else -2)
    assert connection.keys("rq:execution*") == []
    assert connection.zcard("rq:wip:q") == 0


def test_dependents_run_after_their_job(connection: redis.Redis) -> None:
    q = queue(connection)
    first = enqueue(q)
    then = enqueue(q, depends_on=first)
    life = lifecycle(connection, ["q"])
    [claimed] = life.claim(5)

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
    [claimed] = lifecycle(connection, ["q"]).claim(1)

    assert reason in str(refusal(claimed, FUNCTION_NAME))


def test_a_pickled_job_is_refused_without_being_unpickled(connection: redis.Redis) -> None:
    Queue("q", connection=connection).enqueue(FUNCTION_NAME, {"v": 1}, description="d")
    [claimed] = lifecycle(connection, ["q"]).claim(1)

    assert "not JSON" in str(refusal(claimed, FUNCTION_NAME))
