"""The asyncio client: who waits for what, and how each wait ends whatever becomes of the others."""

from __future__ import annotations

import asyncio

import pytest

from shoal import AsyncClient
from shoal.async_job_queue import cancelled


def test_a_client_that_is_left_at_once_closes(redis_url: str) -> None:
    async def run() -> None:
        async with AsyncClient(redis_url) as client:
            await client.redis.ping()

    for _ in range(5):
        asyncio.run(asyncio.wait_for(run(), 10))


def test_a_cancellation_of_one_s_own_goes_through_while_another_task_is_cancelled() -> None:
    async def stubborn() -> None:
        while not asked.is_set():
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                asked.set()
                await asyncio.sleep(0.01)

    async def run() -> None:
        task = asyncio.create_task(stubborn())
        await asyncio.sleep(0)
        outer = asyncio.create_task(cancelled(task))
        await asked.wait()
        outer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await outer
        await task

    asked = asyncio.Event()
    asyncio.run(asyncio.wait_for(run(), 10))
