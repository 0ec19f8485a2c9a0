"""Random SIGKILLs of workers and engines, and that the harness would see what went wrong."""

from __future__ import annotations

import pytest
from rq import Queue
from rq.serializers import JSONSerializer
from tests.faults import audit
from tests.faults.kill_run import Options, run
from tests.faults.report import Report
from tests.faults.server import require_server
from tests.scripted_engine import scripted_worker

from shoal import Client


@pytest.mark.parametrize("queues", [1, 3])
def test_a_thousand_requests_survive_twenty_kills(queues: int) -> None:
    require_server()

    report = run(Options(requests=1_000, kills=20, queues=queues, lease_s=1.0, seed=queues))

    print(report.table())
    assert report.all_violations() == []
    assert (report.requests, sum(report.kills.values())) == (1_000, 20)
    assert report.jobs_hit > 10


def test_the_audit_sees_a_request_without_a_result(redis_url: str) -> None:
    with Client(redis_url) as client:
        [lost] = audit.lost_requests([client.submit("p")], timeout_s=0.05)

    assert "ResultTimeout" in lost


def test_the_audit_sees_a_second_result_a_failed_job_and_each_leftover(redis_url: str) -> None:
    with Client(redis_url) as client:
        job = client.submit("p")
        assert audit.leftovers(client.redis) == ["1 jobs queued in shoal-default"]
        scripted_worker(redis_url, burst=True).run(lambda _ready: None)
        assert audit.leftovers(client.redis) == []

        client.redis.xadd(f"rq:results:{job.id}", {"type": 1})
        client.redis.zadd(audit.LEASES_KEY, {"a:b": 1})
        client.redis.zadd("rq:wip:shoal-default", {"a:b": 1})
        client.redis.sadd("rq:worker:gone:executions", "a:b")
        client.redis.rpush("rq:queue:shoal-default:intermediate", "a")
        failed = Queue("shoal-default", connection=client.redis, serializer=JSONSerializer)
        client.redis.zadd(failed.failed_job_registry.key, {"a": 1})

        assert audit.result_entries(client.redis, [job.id]) == {job.id: 2}
        assert len(audit.leftovers(client.redis)) == 5


def test_a_slow_recovery_and_kills_that_hit_nobody_are_violations() -> None:
    report = Report(
        requests=100,
        jobs=10,
        kills={"worker": 4},
        kills_on_holders=1,
        pauses=0,
        jobs_hit=1,
        requests_hit=10,
        unharmed=0,
        lost=0,
        duplicates=0,
        recovery_s={"worker": [1.0, 12.0], "engine": [], "pause": []},
        recovery_limit_s=11.0,
        rq_info_looks=1,
    )

    slow, missed = report.all_violations()

    assert "waited 12.0 s" in slow
    assert "only 1 kills hit" in missed
    assert report.bounds()["request"] == pytest.approx(0.03)
