"""The asyncio client: who waits for what, and how each wait ends whatever becomes of the others."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

import pytest
import redis
from tests.scripted_worker import ScriptedWorker

from shoal import AsyncClient, GenerationFailed, ResultTimeout, ShoalError
from shoal.async_results import cancelled
from shoal.jobs import results_key


@pytest.fixture
def worker(redis_url: str) -> Iterator[ScriptedWorker]:
    with ScriptedWorker(redis_url) as worker:
        yield worker


@pytest.fixture
def connection(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as connection:
        yield connection


def run(main: Coroutine[Any, Any, None]) -> None:
    """Run to the end, within a time; what is left over is seen."""

    async def watched() -> None:
        async with asyncio.timeout(20):
            await main
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(watched())


async def until(condition: Callable[[], object], what: str) -> None:
    end_s = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end_s, what
        await asyncio.sleep(0.005)


def finish_with(connection: redis.Redis, job_id: str, value: bytes) -> None:
    """End a job with a result of another program's making."""
    connection.hset(f"rq:job:{job_id}", "status", "finished")
    entry: dict[Any, Any] = {"type": 1, "return_value": base64.b64encode(value)}
    connection.xadd(results_key(job_id), entry)


def waits(client: AsyncClient) -> dict[str, Any]:
    assert client._results is not None
    return client._results._waits


def test_a_client_that_is_left_at_once_closes(redis_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            await client.redis.ping()

    for _ in range(5):
        run(main())


def test_a_cancellation_of_one_s_own_goes_through_while_another_task_is_cancelled() -> None:
    async def stubborn() -> None:
        while not asked.is_set():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                asked.set()
                await asyncio.sleep(0.01)

    async def main() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        outer = asyncio.create_task(cancelled(task))
        await asked.wait()
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        await task

    asked = asyncio.Event()
    run(main())


@pytest.mark.parametrize("forbidden", ["-client|unblock", "-client|id", "-client"])
def test_a_user_who_may_not_unblock_waits_all_the_same(
    redis_url: str, worker: ScriptedWorker, connection: redis.Redis, forbidden: str
) -> None:
    connection.execute_command(
        "ACL", "SETUSER", "limited", "reset", "on", ">pw", "~*", "&*", "+@all", forbidden
    )

    async def main() -> None:
        async with AsyncClient(redis_url.replace("unix://", "unix://limited:pw@")) as client:
            held = asyncio.create_task(client.generate("HOLD"))
            await until(lambda: worker.seen, "the first is taken")
            texts = [(await client.generate("more")).text for _ in range(2)]
            worker.released.set()
            assert (await held).text == " said 4 None 0"
            assert texts == [" said 4 None 0"] * 2

    try:
        run(main())
    finally:
        connection.execute_command("ACL", "DELUSER", "limited")


def test_a_result_that_nests_too_deeply_fails_its_own_wait_alone(
    redis_url: str, worker: ScriptedWorker, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            bad, held = await client.submit("HOLD 1"), await client.submit("HOLD 2")
            waiting = [asyncio.create_task(job.result()) for job in (bad, held)]
            await until(lambda: len(worker.seen) == 2, "both are taken")
            finish_with(connection, bad.id, b"[" * 200_000)
            with pytest.raises(GenerationFailed, match="not in the wire format") as caught:
                await waiting[0]
            assert caught.value.code == "bad_result"
            worker.released.set()
            assert (await waiting[1]).text
            assert (await client.generate("after")).text

    run(main())


def test_a_job_whose_keys_are_of_another_type_fails_its_own_wait_alone(
    redis_url: str, worker: ScriptedWorker, connection: redis.Redis
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            held = asyncio.create_task(client.generate("HOLD"))
            await until(lambda: worker.seen, "it is taken")
            connection.set(results_key("other"), "no stream")
            with pytest.raises(redis.ResponseError, match="WRONGTYPE"):
                await client.wait("other")
            worker.released.set()
            assert (await held).text

    run(main())


def test_a_wait_that_nobody_is_left_for_is_forgotten(redis_url: str) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            job = await client.submit("p")
            other = asyncio.create_task(job.result())
            given_up = asyncio.create_task(job.result())
            with pytest.raises(ResultTimeout, match=r"within 0\.05 s; it goes on"):
                await job.result(timeout=0.05)
            given_up.cancel()
            await asyncio.wait([given_up])
            assert list(waits(client)) == [job.id]
            other.cancel()
            await asyncio.wait([other])
            assert waits(client) == {}

    run(main())


def test_who_waits_when_the_client_is_closed_is_told_so(redis_url: str) -> None:
    async def main() -> None:
        client = AsyncClient(redis_url)
        with pytest.raises(ShoalError, match="never opened"):
            await client.submit("p")
        async with client:
            job = await client.submit("p")
            waiting = asyncio.create_task(job.result())
            await until(lambda: waits(client), "it waits")
        with pytest.raises(ShoalError, match=f"closed while job {job.id} was awaited"):
            await waiting
        with pytest.raises(ShoalError, match="is closed"):
            await job.result()

    run(main())


def failing(error: BaseException) -> Callable[..., Awaitable[Any]]:
    async def fail(*_arguments: Any, **_options: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("error", [RuntimeError("a defect"), redis.ResponseError("no")])
def test_whatever_keeps_jobs_from_being_sent_reaches_all_who_send(
    redis_url: str, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            with monkeypatch.context() as patch:
                patch.setattr(client, "_enqueue", failing(error))
                outcomes = await asyncio.gather(
                    client.submit("a"), client.submit("b"), return_exceptions=True
                )
            assert list(outcomes) == [error, error]
            assert await (await client.submit("c")).status() == "queued"

    run(main())


def test_who_sends_when_the_client_is_closed_is_told_so(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        under_way = asyncio.Event()

        async def hang(*_jobs: Any) -> None:
            under_way.set()
            await asyncio.sleep(60)

        async with AsyncClient(redis_url) as client:
            monkeypatch.setattr(client, "_enqueue", hang)
            first = asyncio.create_task(client.submit("a"))
            await under_way.wait()
            second = asyncio.create_task(client.submit("b"))
            await asyncio.sleep(0)
        for sending in (first, second):
            with pytest.raises(ShoalError, match="closed while jobs were being sent"):
                await sending

    run(main())


def test_a_time_out_from_elsewhere_is_not_taken_for_the_caller_s(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            job = await client.submit("p")
            assert client._results is not None
            monkeypatch.setattr(client._results, "_read_states", failing(TimeoutError("DNS")))
            with pytest.raises(TimeoutError, match="DNS"):
                await job.result()

    run(main())


def test_a_wait_that_overtakes_the_read_is_begun_at_once(
    redis_url: str, worker: ScriptedWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            unblock = client.redis.client_unblock
            calls: list[int] = []

            async def too_early(client_id: int) -> bool:
                calls.append(client_id)
                return False if len(calls) < 3 else await unblock(client_id)

            monkeypatch.setattr(client.redis, "client_unblock", too_early)
            held = asyncio.create_task(client.generate("HOLD"))
            await until(lambda: worker.seen, "it is taken")
            await asyncio.sleep(0.05)
            assert (await client.generate("p", timeout=0.8)).text
            assert len(calls) >= 3
            worker.released.set()
            await held

    run(main())


def test_jobs_as_they_end_may_be_left_early(redis_url: str, worker: ScriptedWorker) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            jobs = await client.submit_many(["a", "HOLD 1", "HOLD 2"], requests_per_job=1)
            ended = client.as_completed(jobs)
            assert (await anext(ended)).id == jobs[0].id
            await ended.aclose()  # type: ignore[attr-defined]
            assert waits(client) == {}

    run(main())


@pytest.mark.parametrize("leave", ["close", "cancel"])
def test_a_stream_that_is_left_early_is_cancelled(
    redis_url: str, worker: ScriptedWorker, connection: redis.Redis, leave: str
) -> None:
    async def main() -> None:
        async with AsyncClient(redis_url) as client:
            worker.held_stream_text = " so far" if leave == "close" else ""
            pieces = client.stream("HOLD")
            if leave == "close":
                assert await anext(pieces) == " so far"
                await pieces.aclose()  # type: ignore[attr-defined]
            else:
                reading = asyncio.ensure_future(anext(pieces))
                await until(lambda: worker.seen, "it is taken")
                reading.cancel()
                await asyncio.wait([reading])
            [key] = connection.keys("rq:job:*")
            assert connection.hget(key, "status") == b"canceled"

    run(main())
