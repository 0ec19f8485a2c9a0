"""Generation in this process, without a queue: the worker's own scheduler and engine."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from shoal.errors import GenerationFailed
from shoal.jobs import as_requests
from shoal.wire import MAX_REQUESTS_PER_JOB, GenerationRequest, GenerationResult, JobResult
from shoal_worker.engine_process import load
from shoal_worker.messages import FromEngine, JobDone, JobRefused, Submit
from shoal_worker.settings import read_engine_settings


class Generator:
    """A model and its engine, ready to generate.

    Args:
        model: a folder, a hub id or `demo`, as `shoal worker --model`.
        device, dtype: as `shoal worker`'s.
        settings: any other setting of the engine, such as `lanes` or `threads`.

    Raises:
        ModelError: the model cannot be loaded.
        InvalidRequest: a setting is of the wrong kind or out of range.
    """

    def __init__(
        self, model: str, device: str = "auto", dtype: str = "auto", **settings: Any
    ) -> None:
        given = {"model": model, "device": device, "dtype": dtype, **settings}
        self._loop, self._ready = load(read_engine_settings(given))

    @property
    def model_name(self) -> str:
        """The name in results."""
        return self._ready.model_name

    @property
    def fingerprint(self) -> str:
        """The digest of all that can change a token."""
        return self._ready.fingerprint

    def generate(
        self, requests: Iterable[GenerationRequest | str], **sampling_fields: object
    ) -> list[GenerationResult]:
        """All results, in the order of the requests; failed ones carry their `error`.

        Args:
            requests: prompts, which share the sampling fields, or whole requests. They use the
                lanes of the bulk class, whatever their own.
        """
        bulk = [
            request.model_copy(update={"service_class": "bulk"})
            for request in as_requests(requests, None, sampling_fields)
        ]
        done = self._run(list(_jobs(bulk)))
        return [
            result.model_copy(update={"prompt": request.prompt})
            for result, request in zip(done, bulk, strict=True)
        ]

    def _run(self, jobs: list[Submit]) -> list[GenerationResult]:
        """The results of all jobs, in the jobs' order; slots refill across them."""
        done: dict[str, JobResult] = {}
        for job in jobs:
            self._loop.submit(job)
        try:
            while len(done) < len(jobs):
                for message in self._loop.step():
                    done |= _result(message)
        except BaseException:
            # Interrupted: the next call must not hear of these.
            for job in jobs:
                self._loop.cancel(job.job_id, None)
            raise
        return [result for job in jobs for result in done[job.job_id].results]


def _result(message: FromEngine) -> dict[str, JobResult]:
    if isinstance(message, JobRefused):
        raise GenerationFailed(message.reason)
    if isinstance(message, JobDone):
        return {message.job_id: JobResult.model_validate(message.result)}
    return {}


def _jobs(requests: Iterable[GenerationRequest]) -> Iterator[Submit]:
    rest = iter(requests)
    while group := list(islice(rest, MAX_REQUESTS_PER_JOB)):
        job = {"v": 1, "requests": [request.model_dump() for request in group]}
        yield Submit(uuid.uuid4().hex, "in-process", job, queued_s=0.0, priority=0)
