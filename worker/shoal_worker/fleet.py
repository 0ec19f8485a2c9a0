"""`--device all`: one worker process for each GPU, all on the same queues.

Owns these processes: their settings, the signals they are sent, and what is done about one that
ends by itself. Each is a whole `shoal worker`, so that what ends one leaves the others as they are.
This process loads no torch and talks to no Redis.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from asyncio.subprocess import PIPE, Process
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import click

from shoal.errors import ModelError
from shoal.local_worker import worker_command
from shoal.redis_url import FILE_VARIABLE
from shoal_worker.settings import WorkerSettings, variable

ALL_DEVICES = "all"
MAX_PORT = 65_535
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RESTART_S = 1.0  # Before the first try; twice as long before each next one.
MAX_RESTART_S = 60.0
MAX_FAILED_STARTS = 5  # One after the other, of a worker that has served before.
_COUNT_GPUS = "import torch; print(torch.cuda.device_count())"

log = logging.getLogger("shoal.worker")


def count_gpus() -> int:
    """The GPUs that torch sees here, at least one; asked of another process.

    Raises:
        ModelError: there is none, or torch cannot say.
    """
    asked = subprocess.run(
        [sys.executable, "-c", _COUNT_GPUS], capture_output=True, text=True, check=False
    )
    words = asked.stdout.split()
    if asked.returncode != 0 or not words:
        last_line = (asked.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ModelError(f"--device all: torch cannot count the GPUs: {last_line}")
    number = int(words[-1])
    if number == 0:
        raise ModelError("--device all: torch sees no GPU here; --device auto takes the CPU then")
    return number


def serve_fleet(
    settings: WorkerSettings,
    redis_url: str,
    num_devices: int,
    *,
    command: Callable[..., list[str]] = worker_command,
    restart_s: float = RESTART_S,
) -> int:
    """Run a worker for each device until all have ended; the worst of their last exit codes.

    Args:
        command: makes a worker's command line from its arguments.

    Raises:
        ModelError: the last one's port would be none.
    """
    last_port = settings.metrics_port + num_devices - 1
    if last_port > MAX_PORT:
        raise ModelError(
            f"--metrics-port is {settings.metrics_port}; for {num_devices} GPUs it may be "
            f"{MAX_PORT - num_devices + 1} at most"
        )
    members = [
        _Member(f"cuda:{index}", environment(settings, redis_url, index), command, restart_s)
        for index in range(num_devices)
    ]
    return max(asyncio.run(_run(members)))


def environment(settings: WorkerSettings, redis_url: str, index: int) -> dict[str, str]:
    """The variables of the worker of one GPU: what this one was told, and what differs in each."""
    told = {name: getattr(settings, name) for name in settings.model_fields_set}
    differs: dict[str, Any] = {
        "redis": redis_url,
        "device": f"cuda:{index}",
        "metrics_port": settings.metrics_port and settings.metrics_port + index,
        # Queues are shared: told of by each, sums over them would count several times.
        "export_queues": settings.export_queues and index == 0,
    }
    if "name" in told:
        differs["name"] = f"{settings.name}-{index}"
    environ = dict(os.environ)
    environ.pop(FILE_VARIABLE, None)
    return environ | {variable(name): _text(value) for name, value in (told | differs).items()}


def _text(value: Any) -> str:
    return ",".join(value) if isinstance(value, tuple) else str(value)


async def _run(members: Sequence[_Member]) -> list[int]:
    loop = asyncio.get_running_loop()
    for signum in SIGNALS:
        loop.add_signal_handler(signum, _tell, members, signum)
    return await asyncio.gather(*(member.keep() for member in members))


def _tell(members: Sequence[_Member], signum: int) -> None:
    for member in members:
        member.tell(signum)


class _Member:
    """One GPU's worker: started, and started again if it ends after it has served."""

    def __init__(
        self,
        device: str,
        environ: dict[str, str],
        command: Callable[..., list[str]],
        restart_s: float,
    ) -> None:
        self._device = device
        self._environ = environ
        self._command = command
        self._restart_s = restart_s
        self._process: Process | None = None
        self._stopping = asyncio.Event()

    def tell(self, signum: int) -> None:
        """Pass a signal on; from now on an end is meant."""
        self._stopping.set()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signum)

    async def keep(self) -> int:
        """Run the worker until it is told to end, has nothing to do, or fails for good."""
        has_served, failed_starts = False, 0
        while True:
            served, code = await self._run_once()
            if code == 0 or self._stopping.is_set():
                return code
            has_served |= served
            failed_starts = 0 if served else failed_starts + 1
            log.error("the worker on %s ended with exit code %d", self._device, code)
            # One that never served has a reason that will still be there.
            if not has_served or failed_starts >= MAX_FAILED_STARTS:
                log.error("%s is left alone; the others go on", self._device)
                return code
            wait_s = min(self._restart_s * 2**failed_starts, MAX_RESTART_S)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), wait_s)
                return code

    async def _run_once(self) -> tuple[bool, int]:
        """Whether it served, and its exit code."""
        self._process = await asyncio.create_subprocess_exec(
            *self._command("--device", self._device),
            stdin=subprocess.DEVNULL,
            stdout=PIPE,
            env=self._environ,
            # Ctrl-C reaches only us, who pass it on once: twice would mean not to drain.
            start_new_session=True,
        )
        if self._stopping.is_set():  # The signal came while it was being started.
            self._process.terminate()
        assert self._process.stdout is not None
        served = False
        async for line in self._process.stdout:
            served |= b"ready: " in line
            click.echo(line.decode(errors="replace"), nl=False)
        code = await self._process.wait()
        return served, code if code >= 0 else 128 - code
