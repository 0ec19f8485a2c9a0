"""Real workers with the demo model, and bulk runs as commands, to be killed at will."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.conftest import wait_until
from tests.faults.processes import ROOT

START_S = 120.0  # Several load torch at once, on a machine that does other things too.
BULK = "import sys; from shoal.cli import main; sys.argv[0] = 'shoal'; main()"


class DemoWorker:
    """A `shoal worker` process with the demo model on one thread."""

    def __init__(self, url: str, folder: Path, name: str, lease_s: float) -> None:
        self.name = name
        self._out = folder / f"{name}.out"
        settings = {"model": "demo", "redis": url, "threads": 1, "lease": lease_s, "name": name}
        flags = [f"--{key}={value}" for key, value in settings.items()]
        self._log = folder / f"{name}.log"
        with self._out.open("wb") as out, self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "shoal_worker", *flags, "--metrics-port=0"],
                stdout=out,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )

    @property
    def is_ready(self) -> bool:
        """Whether it serves."""
        assert self.is_alive, f"{self.name} ended: {self._log.read_text()[-2_000:]}"
        return self._out.read_text().startswith("ready")

    @property
    def is_alive(self) -> bool:
        """Whether its process runs."""
        return self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL; its engine ends with it."""
        self._process.kill()
        self._process.wait()


class Fleet:
    """So many workers of one Redis; all are killed at the end of the block."""

    def __init__(self, url: str, folder: Path, lease_s: float) -> None:
        self._url = url
        self._folder = folder
        self._lease_s = lease_s
        self._num_started = 0
        self.workers: list[DemoWorker] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for worker in self.workers:
            worker.kill()

    def start(self, number: int) -> None:
        """Have this many in all, without waiting for them."""
        self.workers = [worker for worker in self.workers if worker.is_alive]
        while len(self.workers) < number:
            self._num_started += 1
            name = f"demo-{os.getpid()}-{self._num_started}"
            self.workers.append(DemoWorker(self._url, self._folder, name, self._lease_s))

    def have(self, number: int) -> None:
        """Have this many that serve."""
        self.start(number)
        wait_until(lambda: all(one.is_ready for one in self.workers), "workers serve", START_S)


class Producer:
    """A `shoal bulk` process."""

    def __init__(self, url: str, source: Path, output: Path, options: list[str]) -> None:
        self._err, self._out = output.with_suffix(".err"), output.with_suffix(".out")
        command = ["bulk", str(source), "-o", str(output), "--redis", url, "--json", *options]
        with self._err.open("ab") as err, self._out.open("wb") as out:
            self._process = subprocess.Popen(
                [sys.executable, "-c", BULK, *command],
                stdout=out,
                stderr=err,
                stdin=subprocess.DEVNULL,
                cwd=ROOT,
            )

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self._process.poll() is None

    def kill(self) -> bool:
        """SIGKILL; whether it ran until then."""
        was_running = self.is_running
        self._process.kill()
        self._process.wait()
        return was_running

    def summary(self) -> dict[str, Any]:
        """What it prints at its end."""
        assert self._process.wait() == 0, self._err.read_text()[-2_000:]
        record: dict[str, Any] = json.loads(self._out.read_text())
        return record
