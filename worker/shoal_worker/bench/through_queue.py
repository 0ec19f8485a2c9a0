"""The whole path: client, Redis, a worker process with its engine, and back.

Owns a Redis and a worker of its own for as long as it is measured. Knows no torch.
"""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Self

from shoal.client import Client, Job
from shoal.embedded import EmbeddedRedis
from shoal.errors import ResultTimeout
from shoal.local_worker import LocalWorker
from shoal.wire import GenerationResult
from shoal_worker.bench.runs import Run
from shoal_worker.bench.workloads import Workload
from shoal_worker.settings import EngineSettings, variable

REQUESTS_PER_JOB = 64
_JOBS_A_TRIP = 16
_LOOK_S = 5.0
_RESULT_TTL_S = 600


class ThroughQueue:
    """A worker with these settings, on a queue that nobody else knows. A context manager.

    Args:
        redis_url: an embedded Redis of its own where not given.
        requests_per_job: as bulk work packs them.
    """

    def __init__(
        self,
        settings: EngineSettings,
        redis_url: str | None = None,
        requests_per_job: int = REQUESTS_PER_JOB,
    ) -> None:
        self._settings = settings
        self._redis_url = redis_url
        self._requests_per_job = requests_per_job
        self._queue = f"shoal-bench-{uuid.uuid4().hex[:8]}"
        self._resources = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            # Not in a folder of the user's: a socket's path may have about a hundred bytes.
            folder = Path(stack.enter_context(TemporaryDirectory(prefix="shoal-")))
            url = self._redis_url or stack.enter_context(EmbeddedRedis(folder)).url
            self._worker = stack.enter_context(
                LocalWorker(
                    self._settings.model, url, [self._queue], folder, variables=self._variables()
                )
            )
            self._client = stack.enter_context(Client(url))
            self._resources = stack.pop_all()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._resources.close()

    def run(self, workload: Workload) -> Run:
        """As fast as it can be sent; counted from the first submission to the last result."""
        started_s = time.perf_counter()
        jobs: list[Job] = []
        size = _JOBS_A_TRIP * self._requests_per_job
        # Not all in one trip: the worker would wait until the last of them is packed.
        for start in range(0, len(workload.requests), size):
            jobs += self._client.submit_many(
                workload.requests[start : start + size],
                queue=self._queue,
                requests_per_job=self._requests_per_job,
                result_ttl=_RESULT_TTL_S,
            )
        results = []
        for job in jobs:
            while (result := self._result(job)) is None:
                self._worker.check()
            results.append(result)
        duration_s = time.perf_counter() - started_s
        workload.check_complete(results)
        return Run(workload.new_tokens, duration_s)

    @staticmethod
    def _result(job: Job) -> GenerationResult | None:
        try:
            return job.result(timeout=_LOOK_S)
        except ResultTimeout:
            return None

    def _variables(self) -> dict[str, str]:
        given = self._settings.model_dump(exclude_none=True, exclude={"model"})
        # Whoever breaks a measurement off wants none of what is in flight.
        given["drain_timeout_s"] = 0
        return {variable(name): str(value) for name, value in given.items()}
