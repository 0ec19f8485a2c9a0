"""The worker process with a scripted engine, through the client, RQ's tools and signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from rq import Queue, Worker
from rq.command import send_shutdown_command, send_stop_job_command
from rq.job import Job as RQJob
from rq.registry import FailedJobRegistry
from rq.serializers import JSONSerializer
from rq.suspension import resume, suspend
from tests.conftest import wait_until
from tests.scripted_engine import scripted_worker

from shoal import AsyncClient, Cancelled, Client, Expired, GenerationFailed, ResultTimeout
from shoal.errors import InvalidRequest, QueueFull, RedisUnavailable
from shoal.job_states import StreamedText
from shoal.wire import GenerationRequest
from shoal_worker import rq_lifecycle, rq_worker
from shoal_worker.rq_lifecycle import LEASES_KEY

StartWorker = Callable[..., AbstractContextManager["subprocess.Popen[str]"]]


@pytest.fixture
def start_worker(redis_url: str) -> StartWorker:
    """Starts a scripted worker process and waits until it is ready."""

    @contextmanager
    def start(*flags: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
        valued = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        module = "tests.scripted_engine"
        command = [sys.executable, "-m", module, redis_url, *flags, *valued]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            assert process.stdout.readline().startswith("ready"), process.stderr.read()  # type: ignore[union-attr]
            try:
                yield process
            finally:
                process.kill()

    return start


@pytest.fixture
def client(redis_url: str) -> Iterator[Client]:
    with Client(redis_url) as client:
        yield client


def test_a_submitted_prompt_comes_back_completed(client: Client, start_worker: StartWorker) -> None:
    with start_worker():
        job = client.submit("once upon", max_tokens=4)
        result = job.result(timeout=60)

    assert (result.text, result.prompt) == ("ONCE UPON", "once upon")
    assert job.done()
    assert job.status == "finished"
    assert client.job(job.id).result(timeout=1).text == "ONCE UPON"


def test_handles_of_packed_requests_each_read_their_own_result(
    client: Client, start_worker: StartWorker
) -> None:
    requests = [GenerationRequest(prompt=f"p{i}") for i in range(10)]
    with start_worker():
        jobs = client.submit_many(requests, requests_per_job=4)
        texts = [job.result(timeout=60).text for job in jobs]

    assert texts == [f"P{i}" for i in range(10)]
    assert len({job.handle.job_id for job in jobs}) == 3
    assert client.job(jobs[5].id).result(timeout=1).text == "P5"


def test_map_keeps_input_order_and_bounds_what_is_in_flight(
    client: Client, start_worker: StartWorker
) -> None:
    taken = 0

    def prompts() -> Iterator[str]:
        nonlocal taken
        for i in range(200):
            taken += 1
            yield f"p{i}"

    with start_worker():
        results = client.map(prompts(), max_in_flight=16, timeout=60)
        first = next(results)
        assert taken <= 17
        texts = [first.text, *(result.text for result in results)]

    assert texts == [f"P{i}" for i in range(200)]


def test_as_completed_hands_out_every_job_once(client: Client, start_worker: StartWorker) -> None:
    with start_worker():
        jobs = client.submit_many([f"p{i}" for i in range(40)], requests_per_job=3)
        ended = list(client.as_completed(jobs, timeout=60))

    assert {job.id for job in ended} == {job.id for job in jobs}
    assert len(ended) == len(jobs)


def test_stream_yields_text_as_it_is_made_and_then_the_rest(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker(delay_s=0.3):
        pieces = list(client.stream("prompt", timeout=60))

    assert pieces == ["PRO", "MPT"]


def test_text_that_comes_twice_after_a_worker_s_death_is_shown_once() -> None:
    streamed = StreamedText()

    def entry(number: int, at: int, text: str) -> tuple[bytes, dict[bytes, bytes]]:
        return f"{number}-0".encode(), {b"at": str(at).encode(), b"text": text.encode()}

    pieces = [
        streamed.add([entry(1, 0, "once "), entry(2, 5, "upon")]),
        streamed.add([entry(3, 0, "once "), entry(4, 5, "upon a "), entry(5, 12, "time")]),
        streamed.rest("once upon a time."),
    ]

    assert pieces == ["once upon", " a time", "."]
    assert streamed.last_id == "5-0"


def test_async_stream_and_map_match_the_blocking_ones(
    redis_url: str, start_worker: StartWorker
) -> None:
    async def run() -> tuple[list[str], list[str]]:
        async with AsyncClient(redis_url) as client:
            pieces = [piece async for piece in client.stream("prompt", timeout=60)]
            prompts = (f"p{i}" for i in range(60))
            mapped = client.map(prompts, max_in_flight=16, timeout=60)
            return pieces, [result.text async for result in mapped]

    with start_worker(delay_s=0.3):
        pieces, texts = asyncio.run(run())

    assert pieces == ["PRO", "MPT"]
    assert texts == [f"P{i}" for i in range(60)]


def test_a_thousand_results_are_awaited_on_one_event_loop(
    redis_url: str, start_worker: StartWorker
) -> None:
    async def run() -> list[str]:
        async with AsyncClient(redis_url) as client:
            prompts = [f"p{i}" for i in range(1000)]
            waits = (client.generate(prompt, timeout=60) for prompt in prompts)
            return [result.text for result in await asyncio.gather(*waits)]

    with start_worker():
        texts = asyncio.run(run())

    assert texts == [f"P{i}" for i in range(1000)]


def test_async_waits_end_with_the_job_s_error_a_time_out_or_a_cancellation(
    redis_url: str,
) -> None:
    async def run() -> None:
        async with AsyncClient(redis_url) as client:
            job = await client.submit("p")
            assert await job.status() == "queued"
            with pytest.raises(ResultTimeout):
                await job.result(timeout=0.05)
            waiting = asyncio.create_task(job.result(timeout=60))
            assert await job.cancel()
            with pytest.raises(Cancelled):
                await waiting
            assert await job.done()
            with pytest.raises(Expired):
                await client.job("no-such-job").result(timeout=5)

    asyncio.run(run())


def test_async_verbs_match_the_blocking_ones(redis_url: str, start_worker: StartWorker) -> None:
    async def run() -> None:
        async with AsyncClient(redis_url) as client:
            jobs = await client.submit_many(["a", "b", "c"], requests_per_job=2)
            ended = [job.id async for job in client.as_completed(jobs)]
            assert sorted(ended) == sorted(job.id for job in jobs)
            assert (await client.job(jobs[1].id).result(timeout=5)).text == "B"

    with start_worker():
        asyncio.run(run())


def test_a_wait_for_a_job_of_a_dead_server_ends_with_an_error(redis_url: str) -> None:
    with Client(redis_url) as client:
        job = client.submit("p")
        with pytest.raises(ResultTimeout, match="it goes on"):
            job.result(timeout=0.05)


def test_cancelling_before_a_worker_comes_means_it_never_runs(
    client: Client, start_worker: StartWorker
) -> None:
    job = client.submit("p")

    assert job.cancel()

    assert not job.cancel()
    with pytest.raises(Cancelled):
        job.result(timeout=5)
    with start_worker():
        assert client.submit("q").result(timeout=60).text == "Q"
        assert job.status == "canceled"


def test_the_same_idempotency_key_is_one_job(client: Client, start_worker: StartWorker) -> None:
    first = client.submit("p", idempotency_key="k")
    second = client.submit("p", idempotency_key="k")

    assert first.id == second.id
    assert client.redis.llen("rq:queue:shoal-default") == 1
    with start_worker():
        assert second.result(timeout=60).text == "P"
    assert client.submit("p", idempotency_key="k").done()


def test_asking_too_late_is_told_when_the_result_expired(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker():
        job = client.submit("p", result_ttl=1)
        job.result(timeout=60)
        wait_until(lambda: job.status == "missing", "the result is gone")

    with pytest.raises(Expired, match=r"expired at \d{4}-\d\d-\d\d \d\d:\d\d:\d\d"):
        job.result(timeout=1)
    with pytest.raises(Expired, match="never submitted here"):
        client.job("unheard-of").result(timeout=1)


def test_a_full_queue_refuses_with_both_numbers(redis_url: str) -> None:
    with Client(redis_url, max_queued_jobs=1) as client:
        client.submit("p")
        with pytest.raises(QueueFull, match="holds 1 jobs; the limit is 1"):
            client.submit("p")


def test_redis_out_of_memory_is_a_full_queue(client: Client) -> None:
    client.redis.config_set("maxmemory", 1)
    try:
        with pytest.raises(QueueFull, match="out of memory"):
            client.submit("p")
    finally:
        client.redis.config_set("maxmemory", 0)
    assert client.redis.keys("rq:job:*") == []


def test_results_are_read_from_a_full_redis(
    client: Client, redis_url: str, start_worker: StartWorker
) -> None:
    async def read(job_id: str) -> str:
        async with AsyncClient(redis_url) as async_client:
            return (await async_client.job(job_id).result(timeout=5)).text

    with start_worker():
        job = client.submit("p")
        job.result(timeout=20)
    client.redis.config_set("maxmemory", 1)
    try:
        assert job.result(timeout=5).text == "P"
        assert asyncio.run(read(job.id)) == "P"
    finally:
        client.redis.config_set("maxmemory", 0)


def test_a_replica_is_no_place_to_submit_to(client: Client) -> None:
    client.redis.replicaof("127.0.0.1", "1")
    try:
        with pytest.raises(RedisUnavailable, match=r"refuses for now: .*read only replica"):
            client.submit("p")
    finally:
        client.redis.replicaof("NO", "ONE")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"max_tokens": 0}, "max_tokens is 0: .*greater than or equal to 1"),
        ({"temprature": 1.0}, "unknown field 'temprature'; did you mean 'temperature'"),
        ({"top_k": "many"}, "top_k is 'many'"),
        ({"queue": ""}, "queue is ''"),
        ({"result_ttl": 0}, "result_ttl is 0"),
        ({"deadline": -1.0}, "deadline is -1.0"),
        ({"service_class": "slow"}, "service_class is 'slow'"),
    ],
)
def test_bad_options_are_refused_at_submit_and_nothing_is_sent(
    client: Client, options: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidRequest, match=text):
        client.submit("p", **options)

    assert client.redis.dbsize() == 0


def test_a_plain_rq_client_enqueues_by_name_and_reads_json(
    redis_url: str, start_worker: StartWorker
) -> None:
    connection = redis.Redis.from_url(redis_url)
    queue = Queue("shoal-default", connection=connection, serializer=JSONSerializer)
    job = queue.enqueue("shoal.generate", {"v": 1, "requests": [{"prompt": "p"}]})

    with start_worker():
        wait_until(lambda: job.get_status() == "finished", "the job is finished")

    [result] = job.return_value(refresh=True)["results"]  # type: ignore[index]
    assert result["completions"][0]["text"] == "P"
    connection.close()


def test_a_foreign_function_is_failed_with_a_reason_and_never_run(
    redis_url: str, start_worker: StartWorker
) -> None:
    with redis.Redis.from_url(redis_url) as connection:
        queue = Queue("shoal-default", connection=connection, serializer=JSONSerializer)
        job = queue.enqueue("subprocess.check_call", ["touch", "ran"], description="d")
        with start_worker():
            wait_until(lambda: job.get_status() == "failed", "the job is failed")
        assert "and nothing else" in str(job.latest_result().exc_string)  # type: ignore[union-attr]


def test_a_malformed_job_is_failed_with_a_reason(client: Client, start_worker: StartWorker) -> None:
    queue = Queue("shoal-default", connection=client.redis, serializer=JSONSerializer)
    job = queue.enqueue("shoal.generate", {"nonsense": 1}, description="d")
    with start_worker(), pytest.raises(GenerationFailed, match="not a GenerationJob"):
        client.job(job.id).result(timeout=60)


@pytest.mark.parametrize("meta", ["not JSON", '["a list"]', '{"requests": "many", "stream": 1}'])
def test_strange_meta_of_another_client_does_no_harm(
    client: Client, start_worker: StartWorker, meta: str
) -> None:
    queue = Queue("shoal-default", connection=client.redis, serializer=JSONSerializer)
    job = queue.enqueue("shoal.generate", {"v": 1, "requests": [{"prompt": "p"}]}, description="d")
    client.redis.hset(job.key, "meta", meta)
    with start_worker():
        assert client.job(job.id).result(timeout=60).text == "P"


def test_rq_lists_the_worker_busy_with_its_jobs_and_then_gone(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker(delay_s=30, name="w1", drain_timeout_s=0.1) as process:
        client.submit_many(["a", "b"], requests_per_job=1)
        [worker] = Worker.all(connection=client.redis)
        wait_until(lambda: len(worker.get_current_executions(refresh=True)) == 2, "both run")
        wait_until(lambda: client.redis.hget("rq:worker:w1", "state") == b"busy", "it is busy")
        assert worker.queue_names() == ["shoal-high", "shoal-default", "shoal-bulk"]
        assert client.redis.hget("rq:worker:w1", "shoal_model") == b"scripted"
        process.send_signal(signal.SIGTERM)
        process.wait(20)

    assert Worker.all(connection=client.redis) == []


def test_sigterm_finishes_what_is_in_flight(client: Client, start_worker: StartWorker) -> None:
    with start_worker(delay_s=0.5) as process:
        job = client.submit("p")
        wait_until(lambda: job.status == "started", "the job runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0

    assert job.result(timeout=1).text == "P"


def test_what_the_drain_time_out_leaves_goes_back_to_the_front_of_its_queue(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker(delay_s=60, drain_timeout_s=0.1) as process:
        job = client.submit("p")
        wait_until(lambda: job.status == "started", "the job runs")
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 1

    assert job.status == "queued"
    retries = client.redis.hget(RQJob.key_for(job.id), "retries_left")
    assert retries == b"3"
    with start_worker():
        assert job.result(timeout=60).text == "P"


def test_a_killed_worker_s_jobs_run_again_on_another(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker(delay_s=60, lease_s=1) as process:
        jobs = client.submit_many([f"p{i}" for i in range(20)], requests_per_job=3)
        wait_until(lambda: jobs[-1].status == "started", "the jobs run")
        process.kill()
    with start_worker(lease_s=1):
        texts = [job.result(timeout=30).text for job in jobs]

    assert texts == [f"P{i}" for i in range(20)]
    for job in jobs:
        assert client.redis.xlen(f"rq:results:{job.handle.job_id}") == 1


def failed_jobs(client: Client) -> list[RQJob]:
    registry = FailedJobRegistry("shoal-default", connection=client.redis)
    fetch = partial(RQJob.fetch, connection=client.redis, serializer=JSONSerializer)
    return [fetch(job_id) for job_id in registry.get_job_ids()]


def test_a_killed_engine_costs_nothing(client: Client, start_worker: StartWorker) -> None:
    with start_worker("--child", delay_s=0.5) as process:
        jobs = client.submit_many([f"p{i}" for i in range(20)], requests_per_job=3)
        wait_until(lambda: jobs[-1].status == "started", "the jobs run")
        [engine] = children(process.pid)
        os.kill(engine, signal.SIGKILL)
        texts = [job.result(timeout=30).text for job in jobs]

    assert texts == [f"P{i}" for i in range(20)]
    assert failed_jobs(client) == []


def children(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def test_a_request_that_kills_the_engine_is_found_and_fails_alone(
    client: Client, start_worker: StartWorker
) -> None:
    prompts = [f"p{i}" for i in range(30)]
    prompts[17] = "crash"
    with start_worker("--child"):
        jobs = client.submit_many(prompts, requests_per_job=5)
        results = [job.result(timeout=60).text for job in jobs[:17] + jobs[18:]]
        with pytest.raises(GenerationFailed, match="SIGKILL each time it ran this request alone"):
            jobs[17].result(timeout=60)
        assert client.submit("next").result(timeout=60).text == "NEXT"

    assert results == [prompt.upper() for prompt in prompts if prompt != "crash"]
    [dead] = failed_jobs(client)
    assert dead.id == f"{jobs[17].handle.job_id}-2"
    assert dead.args[0]["requests"][0]["prompt"] == "crash"


def test_a_job_that_kills_the_engine_is_a_dead_letter(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker():
        jobs = [client.submit("crash"), client.submit("p")]
        assert jobs[1].result(timeout=60).text == "P"
        with pytest.raises(GenerationFailed, match="each time it ran this request alone"):
            jobs[0].result(timeout=60)

    assert [job.id for job in failed_jobs(client)] == [jobs[0].id]


def test_an_engine_that_dies_whatever_it_is_given_ends_the_worker_and_spares_the_rest(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker() as process:
        for _ in range(9):
            client.submit("crash")
        assert process.wait(60) == 1

    assert len(failed_jobs(client)) == 3
    assert client.redis.llen("rq:queue:shoal-default") == 6


def test_many_requests_of_one_job_that_kill_the_engine_do_not_end_the_worker(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker():
        jobs = client.submit_many([*["crash"] * 5, "p", "next"], requests_per_job=6)
        assert [job.result(timeout=60).text for job in jobs[5:]] == ["P", "NEXT"]
        assert not any(job.handle.index > 4 for job in jobs[:5])
        for job in jobs[:5]:
            with pytest.raises(GenerationFailed, match="each time it ran this request alone"):
                job.result(timeout=20)

    assert len(failed_jobs(client)) == 5


def test_rq_s_shutdown_command_drains(client: Client, start_worker: StartWorker) -> None:
    with start_worker(name="w1") as process:
        send_shutdown_command(client.redis, "w1")
        assert process.wait(20) == 0


def test_rq_s_stop_job_command_stops_any_job_in_flight(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker(delay_s=60):
        jobs = [client.submit("a"), client.submit("b")]
        wait_until(lambda: all(job.status == "started" for job in jobs), "both run")
        send_stop_job_command(client.redis, jobs[1].id, serializer=JSONSerializer)
        wait_until(jobs[1].done, "the second has ended")
        assert [job.status for job in jobs] == ["started", "stopped"]
        with pytest.raises(Cancelled):
            jobs[1].result(timeout=1)


def test_what_is_no_command_does_not_deafen_the_worker(
    client: Client, start_worker: StartWorker
) -> None:
    with start_worker(name="w1") as process:
        for nonsense in ("no JSON", "[1]", "7", b"\xff"):
            client.redis.publish("rq:pubsub:w1", nonsense)
        send_shutdown_command(client.redis, "w1")
        assert process.wait(20) == 0


def test_a_suspended_worker_claims_nothing_until_it_is_resumed(
    client: Client, start_worker: StartWorker
) -> None:
    suspend(client.redis)
    with start_worker():
        job = client.submit("p")
        with pytest.raises(ResultTimeout):
            job.result(timeout=0.5)
        resume(client.redis)
        assert job.result(timeout=60).text == "P"


def test_burst_leaves_when_the_queues_are_empty(client: Client, redis_url: str) -> None:
    jobs = client.submit_many(["a", "b"], requests_per_job=1)

    code = scripted_worker(redis_url, burst=True).run(lambda _ready: None)

    assert code == 0
    assert [job.result(timeout=1).text for job in jobs] == ["A", "B"]


def test_burst_leaves_what_is_bound_to_other_workers(client: Client, redis_url: str) -> None:
    bound, job = client.submit("a"), client.submit("b")
    client.redis.hset(f"rq:job:{bound.id}", "meta", '{"fingerprint": "another"}')

    code = scripted_worker(redis_url, burst=True).run(lambda _ready: None)

    assert (code, bound.status, job.status) == (0, "queued", "finished")


def test_burst_ends_while_rq_is_suspended(client: Client, redis_url: str) -> None:
    job = client.submit("a")
    suspend(client.redis)
    code = scripted_worker(redis_url, burst=True).run(lambda _ready: None)

    assert (code, job.status) == (0, "queued")


def test_a_dead_worker_s_jobs_are_taken_back_in_one_go_however_many(
    client: Client, redis_url: str, start_worker: StartWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (rq_lifecycle, rq_worker):
        monkeypatch.setattr(module, "MAX_JOBS_PER_RECOVERY", 2)
    monkeypatch.setattr(rq_worker, "SOCKET_TIMEOUT_S", -3_600)  # No grace after a server's start.
    jobs = client.submit_many(["a", "b", "c", "d", "e"], requests_per_job=1)
    with start_worker(delay_s=60):
        wait_until(lambda: all(job.status == "started" for job in jobs), "all run")
    leases: Any = client.redis.zrange(LEASES_KEY, 0, -1)
    client.redis.zadd(LEASES_KEY, dict.fromkeys(leases, 1))

    # Its next regular look would come much too late.
    monkeypatch.setattr(rq_worker, "RECOVER_S", 3_600)
    scripted_worker(redis_url, burst=True, lease_s=300).run(lambda _ready: None)

    assert [job.status for job in jobs] == ["finished"] * 5


def test_the_producer_loads_no_torch() -> None:
    code = "import shoal, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
