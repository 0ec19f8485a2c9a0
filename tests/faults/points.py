"""Named points at which a worker process kills itself or its engine, for `tests.faults.worker`.

FAULT_POINT is `NAME:before:N` or `NAME:after:N`. For a script (claim, renew, commit, recover) the
worker dies before the N-th sending of it, or after the N-th reply. `recover` counts only calls that
find an overdue lease, and `claim` only calls that find a queued job. For a message, `submit:after`
is the N-th one given to the engine and `answer:after` the N-th job done that was heard of: there
the worker dies, or with `engine-submit`, `engine-answer` its engine alone.
"""

from __future__ import annotations

import hashlib
import os
import signal
import time
from collections import Counter
from importlib.resources import files
from typing import Any

import redis

from shoal_worker.engine_process import EngineProcess
from shoal_worker.messages import FromEngine, JobDone, Submit, ToEngine

VARIABLE = "FAULT_POINT"
SCRIPTS = ("claim", "renew", "commit", "recover")


def install() -> None:
    """Wrap what the point named by FAULT_POINT needs, if one is named."""
    if point := os.environ.get(VARIABLE):
        name, when, number = point.split(":")
        if name in SCRIPTS:
            _wrap_script(name, when, int(number))
        else:
            _wrap_engine(name, int(number))


def _wrap_script(name: str, when: str, number: int) -> None:
    source = files("shoal_worker").joinpath("scripts", f"{name}.lua").read_text()
    sha = hashlib.sha1(source.encode()).hexdigest()
    execute: Any = redis.Redis.execute_command
    calls: Counter[str] = Counter()

    def execute_or_die(self: redis.Redis, *args: Any, **options: Any) -> Any:
        is_ours = args[0] == "EVALSHA" and args[1] == sha and _has_work(self, name, execute)
        calls["before"] += is_ours
        if is_ours and when == "before" and calls["before"] == number:
            _die()
        reply = execute(self, *args, **options)
        # A first call that the server does not know comes back as an error, and is sent again.
        calls["after"] += is_ours
        if is_ours and when == "after" and calls["after"] == number:
            _die()
        return reply

    redis.Redis.execute_command = execute_or_die  # type: ignore[method-assign]


def _has_work(client: redis.Redis, name: str, execute: Any) -> bool:
    """Whether the script will find something to do; asked of the server just before."""
    if name == "recover":
        return bool(execute(client, "ZCOUNT", "rq:shoal:leases", "-inf", time.time()))
    if name == "claim":
        return bool(execute(client, "LLEN", "rq:queue:shoal-default"))
    return True


def _wrap_engine(name: str, number: int) -> None:
    send, receive = EngineProcess.send, EngineProcess.receive
    seen: Counter[type] = Counter()
    wanted = Submit if name.endswith("submit") else JobDone

    def note(process: EngineProcess, message: ToEngine | FromEngine) -> None:
        seen[type(message)] += 1
        if isinstance(message, wanted) and seen[wanted] == number:
            _die(process.pid if name.startswith("engine-") else None)

    def send_or_die(self: EngineProcess, message: ToEngine) -> None:
        send(self, message)
        note(self, message)

    def receive_or_die(
        self: EngineProcess, timeout_s: float, wake: int | None = None
    ) -> list[FromEngine]:
        messages = receive(self, timeout_s, wake)
        for message in messages:
            note(self, message)
        return messages

    EngineProcess.send = send_or_die  # type: ignore[method-assign]
    EngineProcess.receive = receive_or_die  # type: ignore[method-assign]


def _die(pid: int | None = None) -> None:
    os.kill(pid or os.getpid(), signal.SIGKILL)
