"""The results of many jobs, awaited on one connection for all callers on an event loop.

Owns the waits, who waits for what, and the task that reads for all of them: XREAD over many
streams, a second at the most, since RQ writes nothing when a job is cancelled. It sends no job.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import redis

from shoal.errors import ResultTimeout, ShoalError
from shoal.job_queue import MAX_BLOCK_S
from shoal.job_states import JobState, read_job_result, result_streams
from shoal.jobs import results_key
from shoal.redis_url import redis_errors
from shoal.wire import JobResult

UNTOLD_BLOCK_S = 0.1  # Where the read cannot be told of a new wait, which then waits for its end.
UNBLOCK_AGAIN_S = 0.01


@dataclass(slots=True, eq=False)
class _Wait:
    """One job's results, and how many callers await them."""

    results: asyncio.Future[JobResult]
    num_callers: int = 0


class ResultReader:
    """Reads the results of jobs for all who wait. Made on a running event loop.

    Whatever goes wrong ends the waits that it concerns, with the error, and nothing else.

    Args:
        client: a connection is taken from it while anybody waits.
        read_states: what Redis says of these jobs now.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        redis_url: str,
        read_states: Callable[[Sequence[str]], Awaitable[dict[str, JobState]]],
    ) -> None:
        self._redis = client
        self._redis_url = redis_url
        self._read_states = read_states
        self._waits: dict[str, _Wait] = {}
        self._changed = asyncio.Event()
        self._may_unblock = True
        self._is_closing = False
        self._task = asyncio.create_task(self._run(), name="shoal-results")

    async def aclose(self) -> None:
        """Stop reading; whoever still waits is told."""
        # By a flag too: redis-py loses a cancellation that comes while it takes a connection.
        self._is_closing = True
        self._changed.set()
        await cancelled(self._task)
        for job_id in list(self._waits):
            text = f"the client was closed while job {job_id} was awaited; the job goes on"
            self._fail([job_id], ShoalError(text))

    async def wait(self, job_id: str, timeout: float | None) -> JobResult:  # noqa: ASYNC109
        """All results of a job, when it is final; errors as `JobQueue.wait`."""
        wait = self._waits.get(job_id)
        if wait is None:
            wait = self._waits[job_id] = _Wait(asyncio.get_running_loop().create_future())
            wait.results.add_done_callback(retrieve_exception)
            self._changed.set()
        wait.num_callers += 1
        try:
            async with asyncio.timeout(timeout) as limit:
                # Shielded: one caller's time-out is not the others'.
                return await asyncio.shield(wait.results)
        except TimeoutError:
            if not limit.expired():
                raise  # Not ours: it is what became of the wait.
            raise ResultTimeout(f"no result of {job_id} within {timeout:g} s; it goes on") from None
        finally:
            wait.num_callers -= 1
            if wait.num_callers == 0 and self._waits.get(job_id) is wait:
                del self._waits[job_id]  # Nobody is left to read it for.

    async def _run(self) -> None:
        while not self._is_closing:
            await self._changed.wait()
            self._changed.clear()
            connection = self._redis.client()
            try:
                with redis_errors(self._redis_url):
                    await self._read_until_none_wait(await connection.initialize())
            except Exception as error:  # noqa: BLE001
                # An edge: it serves every caller of the client, so the next one's wait must not
                # hang because of whatever ended this one's.
                self._fail(list(self._waits), error)
            finally:
                # Not by `async with`: cancelled on entry, that would leave the connection taken.
                await connection.aclose()

    async def _read_until_none_wait(self, connection: redis.asyncio.Redis) -> None:
        states: dict[str, JobState] = {}
        swept_s = time.monotonic()
        ended: set[str] = set()
        while self._waits and not self._is_closing:
            self._changed.clear()
            is_due = time.monotonic() - swept_s >= MAX_BLOCK_S
            if is_due:
                swept_s = time.monotonic()
            # Cancelled jobs write no result: all statuses are read once a second.
            to_read = [job for job in self._waits if is_due or job in ended or job not in states]
            states |= await self._read(to_read)
            self._settle({job_id: states[job_id] for job_id in to_read if job_id in states})
            states = {job_id: state for job_id, state in states.items() if job_id in self._waits}
            ended = await self._block(connection, states) if states else set()

    async def _read(self, job_ids: Sequence[str]) -> dict[str, JobState]:
        """The states of these jobs; a job that cannot be read costs only its own wait."""
        try:
            return await self._read_states(job_ids)
        except ShoalError:
            raise
        except Exception as error:  # noqa: BLE001
            # Whatever a foreign program made of a job's keys: one such job must not fail the rest.
            if len(job_ids) == 1:
                self._fail(job_ids, error)
                return {}
        states: dict[str, JobState] = {}
        for job_id in job_ids:
            states |= await self._read([job_id])
        return states

    async def _block(
        self, connection: redis.asyncio.Redis, states: dict[str, JobState]
    ) -> set[str]:
        """Until a job has a new result or a new job is awaited; the ids of jobs with results."""
        client_id = await self._client_id(connection)
        block_s = UNTOLD_BLOCK_S if client_id is None else MAX_BLOCK_S
        streams = result_streams(states)
        read = asyncio.ensure_future(connection.xread(streams, count=1, block=int(block_s * 1000)))
        changed = asyncio.ensure_future(self._changed.wait())
        try:
            await asyncio.wait({read, changed}, return_when=asyncio.FIRST_COMPLETED)
            while client_id is not None and not read.done() and not await self._unblock(client_id):
                # It overtook the read on its way to the server.
                await asyncio.wait({read}, timeout=UNBLOCK_AGAIN_S)
            replies: Any = await read or []
        finally:
            await cancelled(read, changed)
        prefix = len(results_key(""))
        return {key.decode()[prefix:] for key, _entries in replies}

    async def _client_id(self, connection: redis.asyncio.Redis) -> int | None:
        """The connection's number at the server, now; None where it is of no use."""
        if self._may_unblock:
            try:
                return int(await connection.client_id())
            except redis.ResponseError:
                self._may_unblock = False
        return None

    async def _unblock(self, client_id: int) -> bool:
        """Whether the read was ended, or has to be waited for."""
        try:
            return bool(await self._redis.client_unblock(client_id))
        except redis.ResponseError:
            # A user without the right, or a proxy without the command: short reads from now on.
            self._may_unblock = False
            return True

    def _settle(self, states: dict[str, JobState]) -> None:
        """End the waits for jobs that are final."""
        for job_id, state in states.items():
            if not state.is_final or job_id not in self._waits:
                continue
            try:
                results = read_job_result(state, job_id)
            except Exception as error:  # noqa: BLE001
                # Mostly what became of the job; else a result that trips what reads it.
                self._fail([job_id], error)
            else:
                self._waits.pop(job_id).results.set_result(results)

    def _fail(self, job_ids: Iterable[str], error: Exception) -> None:
        for job_id in job_ids:
            if (wait := self._waits.pop(job_id, None)) is not None:
                wait.results.set_exception(error)


def retrieve_exception(future: asyncio.Future[Any]) -> None:
    """Keep asyncio from warning of an error whose caller has gone away."""
    if not future.cancelled():
        future.exception()


async def cancelled(*futures: asyncio.Future[Any]) -> None:
    """Cancel futures and wait until all have ended, whatever their end."""
    for future in futures:
        future.cancel()
    if futures:
        # Not awaited themselves: a cancellation of the caller's own must go through.
        await asyncio.wait(futures)
    for future in futures:
        retrieve_exception(future)
