"""A worker process of one's own: started for a command, and gone when the command is.

Owns the process, its log and its end. Which queue it serves and whether one is needed is the
caller's; what a worker does is `shoal_worker`'s, which is only ever run, never imported.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from shoal.errors import ShoalError
from shoal.logs import FORMAT_VARIABLE
from shoal.redis_url import FILE_VARIABLE

READY_WORD = "ready"
POLL_S = 0.05
STOP_TIMEOUT_S = 75.0  # Over the worker's own limit for finishing what it runs.

# The worker is in a session of its own, so that Ctrl-C reaches only the command, which then stops
# it in order. On Linux the kernel ends it if the command is killed and cannot.
_LAUNCH = """
import ctypes, os, sys
PR_SET_PDEATHSIG, SIGTERM = 1, 15
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGTERM)
os.execv(sys.executable, [sys.executable, "-m", "shoal_worker", *sys.argv[1:]])
"""


def worker_command(*arguments: str) -> list[str]:
    """The command of a worker process that drains when the process that started it is killed."""
    return [sys.executable, "-c", _LAUNCH, *arguments]


class LocalWorker:
    """One worker process. A context manager, or `start` and `stop`.

    Args:
        model: as `shoal worker --model` takes it.
        redis_url: where its queues are.
        queues: the queues it serves, most urgent first.
        folder: an existing folder for its two logs.
        name: distinguishes the logs of several.
        variables: more of its settings, as SHOAL_* variables.
    """

    def __init__(
        self,
        model: str,
        redis_url: str,
        queues: Sequence[str],
        folder: Path,
        name: str = "worker",
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model
        self.log_file = folder / f"{name}.log"
        self._out_file = folder / f"{name}.out"
        # By variable, not by flag: a URL may hold a password, and arguments are everybody's to see.
        # Its lines are read here: the one that says `ready`, and the last one of one that failed.
        self._variables = {
            **(variables or {}),
            FORMAT_VARIABLE: "text",
            "SHOAL_REDIS_URL": redis_url,
            FILE_VARIABLE: "",
        }
        self._arguments = ["--model", model, "--queues", ",".join(queues), "--metrics-port", "0"]
        self._process: subprocess.Popen[bytes] | None = None
        self._is_told = False

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Launch the process; it is not ready when this returns."""
        # Files, not pipes: nobody has to read on for the worker not to block.
        with self._out_file.open("wb") as out, self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                worker_command(*self._arguments),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=os.environ | self._variables,
                start_new_session=True,
            )

    def wait_ready(self) -> None:
        """Until it serves, however long its model takes to load.

        Raises:
            ShoalError: it ended instead; the message carries the last line of its log.
        """
        while not self._is_ready():
            self.check()
            time.sleep(POLL_S)

    def check(self) -> None:
        """Raises ShoalError if the process has ended, with the last line of its log."""
        if self._process is None or self._process.poll() is None:
            return
        when = "while it served" if self._is_ready() else "before it was ready"
        raise ShoalError(
            f"the worker for model {self.model} ended {when} "
            f"(exit code {self._process.returncode}): {self._last_log_line()}"
        )

    def tell_to_stop(self) -> None:
        """Send SIGTERM, once: to a worker a second one means not to finish what it holds."""
        if self._process is not None and not self._is_told:
            self._is_told = True
            self._process.terminate()

    def stop(self) -> None:
        """End it by SIGTERM, so that it finishes or gives back what it holds, and wait."""
        self.tell_to_stop()
        process, self._process = self._process, None
        if process is None:
            return
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_TIMEOUT_S)
        finally:
            # Also on a second Ctrl-C: the whole session, since the engine is a child of its own.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def _is_ready(self) -> bool:
        lines = self._out_file.read_text(errors="replace").splitlines()
        return any(line.startswith(READY_WORD) for line in lines)

    def _last_log_line(self) -> str:
        lines = self.log_file.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "it logged nothing")
        return last.removeprefix("shoal: ")
