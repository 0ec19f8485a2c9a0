"""A worker lives through a Redis that goes, is silent, full, read-only or busy; nothing is lost."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest
from rq.command import send_stop_job_command
from rq.serializers import JSONSerializer
from tests.conftest import wait_until
from tests.faults import outages
from tests.faults.audit import assert_each_request_came_back_once, committed_executions, job_ids_of
from tests.faults.conftest import StartWorker
from tests.faults.outages import Outage
from tests.faults.processes import WorkerProcess, moved
from tests.faults.proxy import Proxy
from tests.faults.server import RedisServer, require_server

from shoal import Client
from shoal.client import Job

LEASE_S = 1.0
OUTAGE_S = 2.5 * LEASE_S  # Long enough for every lease to run out.
RETURN_LIMIT_S = LEASE_S + 10.0
MAX_CPU_RATIO = 0.25
MAX_CONNECTIONS_PER_S = 10

ON_THE_WAY: list[Outage] = [outages.cut, outages.refused, outages.swallowed, outages.stalled]
AT_THE_SERVER: list[Outage] = [
    outages.killed_and_restarted,
    outages.full,
    outages.unable_to_save,
    outages.a_replica,
    outages.busy,
]
# Those that also reach the connection on which RQ's commands come.
CONNECTION_ENDING: list[Outage] = [outages.killed_and_restarted, outages.busy]
ALL = ON_THE_WAY + AT_THE_SERVER


def name_of(outage: Outage) -> str:
    """For the names of tests."""
    return str(getattr(outage, "__name__", outage))


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """A server that forgets nothing when it is killed, and may be misconfigured."""
    require_server()
    durable = ["--appendonly", "yes", "--appendfsync", "always"]
    with RedisServer(*durable, "--enable-protected-configs", "yes") as server:
        yield server


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    """What the workers take for Redis."""
    with Proxy(server.port) as proxy:
        yield proxy


def pass_the_leases(worker: WorkerProcess) -> None:
    """Until every lease has run out, with the worker aware of the fault and not hectic."""
    started_s, cpu_s = time.monotonic(), worker.cpu_s()
    wait_until(lambda: worker.exit_code is not None or "Redis fails" in worker.log, "it is seen")
    worker.assert_alive()
    wait_until(lambda: time.monotonic() - started_s > OUTAGE_S, "all leases have run out")
    used_ratio = (worker.cpu_s() - cpu_s) / (time.monotonic() - started_s)
    assert used_ratio < MAX_CPU_RATIO


def executions(client: Client, job_ids: list[str]) -> dict[str, list[str]]:
    """Where each job runs now."""
    runs: dict[str, list[str]] = {}
    for job_id in job_ids:
        members: Any = client.redis.zrange(f"rq:executions:{job_id}", 0, -1)
        runs[job_id] = [member.decode() for member in members]
    return runs


@pytest.mark.parametrize("outage", ALL, ids=name_of)
def test_what_ended_during_an_outage_is_committed_once_after_it(
    server: RedisServer, proxy: Proxy, client: Client, start_worker: StartWorker, outage: Outage
) -> None:
    worker = start_worker(proxy.url, delay_s=0.5)
    jobs = client.submit_many([f"p{i}" for i in range(12)], requests_per_job=3)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    runs = executions(client, job_ids_of(jobs))

    with outage(server, proxy):
        pass_the_leases(worker)

    assert_each_request_came_back_once(client, jobs, RETURN_LIMIT_S)
    assert {job_id: committed_executions(client.redis, job_id) for job_id in runs} == runs
    assert client.submit("after").result(timeout=60).text == "AFTER"
    worker.assert_alive()


@pytest.mark.parametrize("outage", ALL, ids=name_of)
def test_holders_keep_their_jobs_through_an_outage_beside_a_worker_that_could_take_them(
    server: RedisServer, proxy: Proxy, client: Client, start_worker: StartWorker, outage: Outage
) -> None:
    holder = start_worker(proxy.url, delay_s=OUTAGE_S + 2)
    jobs = client.submit_many([f"p{i}" for i in range(12)], requests_per_job=3)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    runs = executions(client, job_ids_of(jobs))
    idle = start_worker(proxy.url)

    with outage(server, proxy):
        pass_the_leases(holder)

    assert_each_request_came_back_once(client, jobs, RETURN_LIMIT_S)
    assert {job_id: committed_executions(client.redis, job_id) for job_id in runs} == runs
    holder.assert_alive()
    idle.assert_alive()


@pytest.mark.parametrize("outage", ON_THE_WAY, ids=name_of)
def test_nothing_is_claimed_and_few_connections_are_tried_during_an_outage(
    server: RedisServer, proxy: Proxy, client: Client, start_worker: StartWorker, outage: Outage
) -> None:
    worker = start_worker(proxy.url)

    with outage(server, proxy):
        num_before = proxy.num_connections
        wait_until(lambda: "Redis fails" in worker.log, "it is seen")
        jobs = client.submit_many(["a", "b"], requests_per_job=1)
        pass_the_leases(worker)
        assert [job.status for job in jobs] == ["queued", "queued"]
        num_tried = proxy.num_connections - num_before

    assert num_tried <= MAX_CONNECTIONS_PER_S * OUTAGE_S * 2
    assert_each_request_came_back_once(client, jobs, RETURN_LIMIT_S)


@pytest.mark.parametrize("outage", [*ON_THE_WAY, *CONNECTION_ENDING], ids=name_of)
def test_rq_s_commands_are_heard_after_an_outage(
    server: RedisServer, proxy: Proxy, client: Client, start_worker: StartWorker, outage: Outage
) -> None:
    worker = start_worker(proxy.url, delay_s=60)
    with outage(server, proxy):
        pass_the_leases(worker)
    job = client.submit("p")
    wait_until(lambda: job.status == "started", "the job runs")

    def stopped() -> bool:
        # A command that is published while nobody listens is lost, as RQ's are.
        send_stop_job_command(client.redis, job.id, serializer=JSONSerializer)
        return job.done()

    wait_until(stopped, "the job is stopped")


@pytest.mark.parametrize("script", ["claim", "commit", "renew"])
def test_a_lost_reply_loses_nothing_and_is_counted_as_what_it_was(
    proxy: Proxy, client: Client, start_worker: StartWorker, script: str
) -> None:
    worker = start_worker(proxy.url, delay_s=1.0)
    first = client.submit("first")
    wait_until(lambda: first.status == "started", "the scripts are known to the server")
    # Of all claims the one that takes the second job, whose description says this.
    proxy.lose_reply(script, b"3 requests" if script == "claim" else b"")
    second = client.submit_many(["a", "b", "c"], requests_per_job=3)

    assert_each_request_came_back_once(client, [first, *second], RETURN_LIMIT_S)

    assert proxy.reply_lost.is_set()
    wait_until(lambda: moved(worker, "committed") + moved(worker, "fenced") == 2, "both ended")
    assert moved(worker, "fenced") == 0
    worker.assert_alive()


def test_a_lost_reply_of_a_recovery_loses_nothing(
    proxy: Proxy, client: Client, start_worker: StartWorker
) -> None:
    dead = start_worker(delay_s=60)
    jobs = client.submit_many(["a"], requests_per_job=1)
    wait_until(lambda: jobs[-1].status == "started", "the jobs run")
    proxy.lose_reply("recover", containing=jobs[0].id.encode())
    worker = start_worker(proxy.url)

    dead.kill()

    assert_each_request_came_back_once(client, jobs, RETURN_LIMIT_S)
    assert proxy.reply_lost.is_set()
    worker.assert_alive()


@pytest.mark.parametrize("delay_s", [0.02, 0.1])
def test_a_slow_network_is_no_fault(
    proxy: Proxy, client: Client, start_worker: StartWorker, delay_s: float
) -> None:
    worker = start_worker(proxy.url, delay_s=0.5)

    with proxy.slow(delay_s):
        jobs = client.submit_many([f"p{i}" for i in range(12)], requests_per_job=3)
        assert_each_request_came_back_once(client, jobs, RETURN_LIMIT_S)

    wait_until(lambda: moved(worker, "committed") == 4, "all are counted as committed")
    assert moved(worker, "fenced") == 0


def test_connections_cut_again_and_again_lose_nothing(
    proxy: Proxy, client: Client, start_worker: StartWorker
) -> None:
    workers = [start_worker(proxy.url, delay_s=0.1, max_in_flight=8) for _ in range(2)]
    jobs = client.submit_many([f"p{i}" for i in range(200)], requests_per_job=2)

    num_done = -1
    while num_done < len(jobs):
        wait_until(lambda before=num_done: count_done(jobs) > before, "work goes on")
        num_done = count_done(jobs)
        proxy.cut()

    assert_each_request_came_back_once(client, jobs, RETURN_LIMIT_S)
    assert [worker.exit_code for worker in workers] == [None, None]


def count_done(jobs: list[Job]) -> int:
    """Requests whose job has ended."""
    return sum(job.done() for job in jobs)
