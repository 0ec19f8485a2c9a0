"""A worker without a model: takes jobs from RQ's queues and answers with scripted text.

`python scripted_worker.py` stands in for `python -m shoal_worker`; `ScriptedWorker` is a thread.
Words in a prompt tell it what to do: FAIL, FLAKY (fails the first time), TOOLONG, JOBFAIL, HOLD
(waits until `released`).
"""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import redis
from rq.exceptions import NoSuchJobError
from rq.job import Job, JobStatus
from rq.serializers import JSONSerializer
from rq.utils import now, utcformat

from shoal.jobs import stream_key
from shoal.wire import (
    Completion,
    GenerationJob,
    GenerationRequest,
    GenerationResult,
    ResultError,
    Usage,
)

FINGERPRINT = "scripted-1"
ERRORS = {
    "TOOLONG": ResultError(code="prompt_too_long", message="the prompt is 99 tokens; 64 fit"),
    "FAIL": ResultError(code="engine_error", message="scripted to fail"),
}


class ScriptedWorker(threading.Thread):
    """Serves until it is left; `released` lets jobs with HOLD in a prompt go on."""

    def __init__(
        self,
        url: str,
        queues: tuple[str, ...] = ("shoal-default", "shoal-bulk"),
        model: str = "m",
        fingerprint: str = FINGERPRINT,
    ) -> None:
        super().__init__(daemon=True)
        self.redis = redis.Redis.from_url(url)
        self.queues = queues
        self.model = model
        self.fingerprint = fingerprint
        self.released = threading.Event()
        self.stopped = threading.Event()
        self.seen: list[GenerationRequest] = []
        self.held_stream_text = ""  # Streamed by jobs with HOLD before they are held.
        self.key = f"rq:worker:scripted-{os.getpid()}-{id(self)}"

    def __enter__(self) -> Self:
        fields: dict[Any, Any] = {
            "queues": ",".join(self.queues),
            "state": "idle",
            "last_heartbeat": utcformat(now()),
            "hostname": socket.gethostname(),
            "pid": os.getpid(),
            "shoal_model": self.model,
            "shoal_device": "cpu",
            "shoal_fingerprint": self.fingerprint,
            "shoal_slots": 8,
            "shoal_running": 0,
            "shoal_tokens_per_s": 12.5,
            "shoal_padding_ratio": 0.25,
        }
        self.redis.hset(self.key, mapping=fields)
        self.redis.sadd("rq:workers", self.key)
        self.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stopped.set()
        self.join(10)
        self.redis.srem("rq:workers", self.key)
        self.redis.delete(self.key)
        self.redis.close()

    def run(self) -> None:
        keys = [f"rq:queue:{queue}" for queue in self.queues]
        held: list[Job] = []
        while not self.stopped.is_set():
            popped: Any = self.redis.blpop(keys, timeout=0.05)
            if popped is not None:
                held += self._taken(popped[1].decode())
            ready = [job for job in held if self.released.is_set() or "HOLD" not in str(job.args)]
            for job in ready:
                held.remove(job)
                self._answer(job)

    def _taken(self, job_id: str) -> list[Job]:
        try:
            job = Job.fetch(job_id, connection=self.redis, serializer=JSONSerializer)
        except NoSuchJobError:
            return []  # Cancelled and deleted since.
        if job.meta.get("fingerprint", self.fingerprint) != self.fingerprint:
            self.redis.rpush(f"rq:queue:{job.origin}", job.id)
            self.stopped.wait(0.02)
            return []
        if not self._write(job, "queued", partial(job.set_status, JobStatus.STARTED)):
            return []
        self.seen += GenerationJob.model_validate(job.args[0]).requests
        if self.held_stream_text and job.meta.get("stream"):
            self.redis.xadd(stream_key(job.id), {"at": 0, "text": self.held_stream_text})
        return [job]

    def _write(self, job: Job, status: str, write: Callable[[Any], object]) -> bool:
        """Write in one transaction, if the job has this status; a deleted one stays deleted."""
        with self.redis.pipeline() as pipeline:
            pipeline.watch(job.key)
            if pipeline.hget(job.key, "status") != status.encode():
                return False
            pipeline.multi()
            write(pipeline)
            try:
                pipeline.execute()
            except redis.WatchError:
                return False
        return True

    def _answer(self, job: Job) -> None:
        requests = GenerationJob.model_validate(job.args[0]).requests
        if any("JOBFAIL" in str(request.prompt) for request in requests):
            self._write(job, "started", partial(_fail, job))
            return
        results = [self._result(job.id, i, request) for i, request in enumerate(requests)]
        if job.meta.get("stream"):
            for word in re.finditer(r" \S+", results[0].text):
                self.redis.xadd(stream_key(job.id), {"at": word.start(), "text": word[0]})
        job._result = {"v": 1, "results": [result.model_dump(mode="json") for result in results]}
        self._write(job, "started", partial(_succeed, job))

    def _result(self, job_id: str, index: int, request: GenerationRequest) -> GenerationResult:
        prompt, result_id = str(request.prompt), request.id or f"{job_id}:{index}"
        if "FLAKY" in prompt and sum(seen.prompt == prompt for seen in self.seen) == 1:
            flaky = ResultError(code="engine_error", message="try again", retryable=True)
            return GenerationResult(id=result_id, error=flaky)
        for word, error in ERRORS.items():
            if word in prompt:
                return GenerationResult(id=result_id, error=error)
        num_tokens = 0 if request.count_only else request.sampling.max_tokens
        completions = [
            Completion(
                index=sample,
                text=f" said {len(prompt)} {request.sampling.seed} {sample}",
                token_ids=list(range(num_tokens)),
                finish_reason="length",
            )
            for sample in range(request.sampling.n)
        ]
        return GenerationResult(
            id=result_id,
            completions=completions,
            usage=Usage(
                prompt_tokens=len(prompt), completion_tokens=num_tokens * request.sampling.n
            ),
            model=self.model,
            fingerprint=self.fingerprint,
        )


def _fail(job: Job, pipeline: Any) -> None:
    job.set_status(JobStatus.FAILED, pipeline=pipeline)
    job._handle_failure("Traceback\nValueError: scripted to fail", pipeline)


def _succeed(job: Job, pipeline: Any) -> None:
    job._handle_success(job.result_ttl, pipeline)
    job.cleanup(job.result_ttl, pipeline=pipeline, remove_from_queue=False)


def main() -> None:
    """Serve as `shoal worker` would: settings by flags and variables, `ready`, until SIGTERM."""
    flags = dict(zip(sys.argv[1::2], sys.argv[2::2], strict=True))
    if flags["--model"] == "broken":
        sys.exit("shoal: model 'broken' does not exist")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    queues = tuple(flags["--queues"].split(","))
    with ScriptedWorker(os.environ["SHOAL_REDIS_URL"], queues, flags["--model"]) as worker:
        if "SCRIPTED_HOLD" not in os.environ:
            worker.released.set()
        print("ready: scripted", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
