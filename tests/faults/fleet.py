"""Real workers, and bulk runs as commands, to be killed at will."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.conftest import wait_until
from tests.faults.processes import ROOT

START_S = 120.0  # Several load torch at once, on a machine that does other things too.
BULK = "import sys; from shoal.cli import main; sys.argv[0] = 'shoal'; main()"


class RealWorker:
    """A `shoal worker` process on one thread.

    Args:
        folder: where its output and log go.
        settings: more of its flags, by name.
    """

    def __init__(self, url: str, folder: Path, name: str, device: str, **settings: Any) -> None:
        self.name = name
        self.device = device
        self._out = folder / f"{name}.out"
        settings |= {"redis": url, "threads": 1, "name": name, "device": device}
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
    """So many workers of one Redis; all are killed at the end of the block.

    Args:
        folder: where their output and logs go.
        devices: a worker goes where the fewest are.
    """

    def __init__(
        self,
        url: str,
        folder: Path,
        lease_s: float,
        model: str = "demo",
        devices: Sequence[str] = ("auto",),
    ) -> None:
        self._url = url
        self._folder = folder
        self._lease_s = lease_s
        self._model = model
        self._devices = devices
        self._num_started = 0
        self.workers: list[RealWorker] = []

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
            name = f"real-{os.getpid()}-{self._num_started}"
            taken = [worker.device for worker in self.workers]
            device = min(self._devices, key=taken.count)
            self.workers.append(
                RealWorker(
                    self._url, self._folder, name, device, model=self._model, lease=self._lease_s
                )
            )

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
