"""A worker whose engine answers from a script: all of the queue's side, no model.

Run as a module it is a real worker process, for tests that kill one:
`python -m tests.scripted_engine REDIS_URL [--delay-s S] [--name N] [--lease-s S] [--child]`.
With `--child` the engine is a process of its own, as the real one is (`scripted_child`).
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from typing import Any

from shoal.wire import Completion, GenerationResult, Usage
from shoal_worker.engine_process import EngineProcess
from shoal_worker.messages import (
    Cancel,
    FromEngine,
    JobDone,
    JobRefused,
    Ready,
    Submit,
    TextDelta,
    ToEngine,
)
from shoal_worker.rq_worker import Worker
from shoal_worker.settings import WorkerSettings, read_settings

TEMPLATE = GenerationResult(
    id="",
    completions=[Completion(index=0, text="", token_ids=[1], finish_reason="length")],
    usage=Usage(prompt_tokens=1, completion_tokens=1),
    model="scripted",
    fingerprint="f" * 16,
).model_dump(mode="json")
DELAY_VARIABLE = "SCRIPTED_DELAY_S"
READY = Ready("scripted", "f" * 16, "cpu", "float32", 64, {"bulk-64x64": 64}, 0.0, 64 * 64)


class ScriptedEngine:
    """Answers each job `delay_s` after it came, with its prompts in capitals.

    A prompt `crash` ends the process as a segmentation fault would.
    """

    def __init__(self, delay_s: float = 0.0) -> None:
        self._delay_s = delay_s
        self._jobs: dict[str, tuple[float, Submit]] = {}
        self._outbox: list[FromEngine] = [READY]
        self._dead = False
        self.is_alive = True
        self.pid = 0

    def send(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._jobs[message.job_id] = (time.monotonic() + self._delay_s, message)
                if message.streams:
                    self._outbox.append(TextDelta(message.job_id, "PRO", 0))
            case Cancel(job_id, None):
                self._jobs.pop(job_id, None)

    def receive(self, timeout_s: float, wake: int | None = None) -> list[FromEngine]:
        if self._dead:
            raise EOFError
        now_s = time.monotonic()
        due = [job_id for job_id, (at_s, _) in self._jobs.items() if at_s <= now_s]
        if not due and not self._outbox:
            time.sleep(min(timeout_s, 0.005))
        for job_id in due:
            answer = self._answer(self._jobs.pop(job_id)[1])
            if self._dead:
                break
            self._outbox.append(answer)
        taken, self._outbox = self._outbox, []
        return taken

    def _answer(self, message: Submit) -> FromEngine:
        if not isinstance(message.job, dict) or "requests" not in message.job:
            return JobRefused(message.job_id, "not a GenerationJob", message.execution_id)
        prompts = {i: str(one["prompt"]) for i, one in enumerate(message.job["requests"])}
        if message.indexes is not None:
            prompts = {i: prompts[i] for i in message.indexes}
        self._dead = "crash" in prompts.values()
        results = [_result(f"{message.job_id}:{i}", p) for i, p in prompts.items()]
        return JobDone(
            message.job_id, {"v": 1, "results": results}, message.indexes, message.execution_id
        )

    def exit_text(self) -> str:
        return "was killed by SIGSEGV"

    def kill(self) -> None:
        self.is_alive = False

    def stop(self) -> None:
        self.is_alive = False


def _result(request_id: str, prompt: str) -> dict[str, Any]:
    """As JSON, made by hand: a benchmark of the queue must not measure pydantic."""
    return TEMPLATE | {
        "id": request_id,
        "completions": [TEMPLATE["completions"][0] | {"text": prompt.upper()}],
    }


def scripted_worker(redis_url: str, *, delay_s: float = 0.0, **settings: Any) -> Worker:
    """A worker with a scripted engine, not yet running."""
    return Worker(
        _settings(settings),
        redis_url,
        start_engine=lambda: ScriptedEngine(delay_s),  # type: ignore[arg-type, return-value]
    )


def worker_with_child(redis_url: str, *, delay_s: float = 0.0, **settings: Any) -> Worker:
    """A worker whose scripted engine is a process of its own, not yet running."""
    os.environ[DELAY_VARIABLE] = str(delay_s)  # Read by the child.
    read = _settings(settings)
    return Worker(
        read,
        redis_url,
        start_engine=lambda: EngineProcess(read.engine, "info", "tests.scripted_child"),
    )


def _settings(values: dict[str, Any]) -> WorkerSettings:
    return read_settings({"model": "scripted", "poll_s": 0.005, **values})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("redis_url")
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--lease-s", type=float, default=30.0)
    parser.add_argument("--drain-timeout-s", type=float, default=60.0)
    parser.add_argument("--name", default=None)
    parser.add_argument("--poll-s", type=float, default=0.005)
    parser.add_argument("--queues", default=None)
    parser.add_argument("--max-in-flight", type=int, default=None)
    parser.add_argument("--child", action="store_true")
    options = vars(parser.parse_args())
    start = worker_with_child if options.pop("child") else scripted_worker
    worker = start(options.pop("redis_url"), **options)
    sys.exit(worker.run(lambda ready: print("ready", ready.model_name, flush=True)))


if __name__ == "__main__":
    main()
