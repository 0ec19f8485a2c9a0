"""Worker processes as the fault tests see them: a pid, an engine child, a log, signals."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import redis
from tests.conftest import wait_until

ROOT = Path(__file__).parents[2]
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_numbers = itertools.count()


class WorkerProcess:
    """A scripted worker with its engine in a child process of its own.

    Args:
        folder: where its log goes.
        module: what runs; `tests.faults.worker` can be told to die at a named point.
        options: its flags, such as `lease_s=1`.

    Attributes:
        num_engine_kills: how often this test has killed its engine.
        killed: whether this test has killed the worker itself.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        *,
        module: str = "tests.scripted_engine",
        environment: Mapping[str, str] = {},
        **options: Any,
    ) -> None:
        self.name = f"w{next(_numbers)}-{os.getpid()}"
        self.num_engine_kills = 0
        self.killed = False
        self.started_s = time.monotonic()
        self._log_path = folder / f"{self.name}.log"
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, url, "--child", f"--name={self.name}", *flags],
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.kill()

    @property
    def log(self) -> str:
        """All it has printed."""
        return self._log_path.read_text(errors="replace")

    @property
    def pid(self) -> int:
        """The worker process's id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def assert_alive(self) -> None:
        """It has not ended; else its last words are the failure."""
        assert self.exit_code is None, "the worker died: " + self.log.strip().rpartition("\n")[2]

    @property
    def is_ready(self) -> bool:
        """Whether it has said that its first engine is loaded."""
        return "ready scripted" in self.log

    def wait_ready(self) -> None:
        """Until it serves."""
        wait_until(lambda: self.is_ready or self.exit_code is not None, "the worker is ready")
        self.assert_alive()

    def wait_exit(self, timeout_s: float = 60.0) -> int:
        """Its exit code, when it has ended."""
        return self._process.wait(timeout_s)

    def engine_pid(self) -> int | None:
        """The process of its engine, if it has one just now."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except OSError:
            return None
        return int(children[0]) if children else None

    def held(self, client: redis.Redis) -> dict[str, str]:
        """The jobs that Redis says it holds: execution id by job id."""
        members: Any = client.smembers(f"rq:worker:{self.name}:executions")
        pairs = [member.decode().rpartition(":") for member in members]
        return {job_id: execution_id for job_id, _, execution_id in pairs}

    def freeze(self) -> None:
        """SIGSTOP the worker, and wait until it stands still; its engine goes on."""
        self._process.send_signal(signal.SIGSTOP)
        wait_until(lambda: self._state() in {"T", "t", "Z", "X"}, "the worker is stopped")

    def go_on(self) -> None:
        """SIGCONT."""
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """SIGKILL the worker; its engine ends by itself."""
        self.killed = True
        self._process.kill()
        self._process.wait()

    def kill_engine(self, pid: int) -> None:
        """SIGKILL the engine alone."""
        self.num_engine_kills += 1
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM: drain."""
        self._process.terminate()

    def cpu_s(self) -> float:
        """Processor time it has used, its engine not counted."""
        fields = self._stat()
        return (int(fields[11]) + int(fields[12])) / TICKS_PER_S

    def _state(self) -> str:
        return self._stat()[0]

    def _stat(self) -> list[str]:
        """The fields of /proc/PID/stat from the third on; the second may hold blanks."""
        text = Path(f"/proc/{self.pid}/stat").read_text()
        return text.rpartition(")")[2].split()


def moved(worker: WorkerProcess, kind: str) -> int:
    """Jobs that the worker says it moved so."""
    return sum(
        int(line.split()[2]) for line in worker.log.splitlines() if line.startswith(f"moved {kind}")
    )
