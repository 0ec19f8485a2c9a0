"""Shoal's processes beside a Prometheus that scrapes them, for as long as a block lasts.

Owns how each is started, which address it tells, and that all of them end. What they are given to
do is the caller's.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

PROMETHEUS = Path(__file__).resolve().parent / "prometheus"
READY_S = 120.0
STOP_S = 20.0
POLL_S = 0.05


class NotStartedError(Exception):
    """A process ended, or said nothing, before it was ready."""


@dataclass(frozen=True)
class Server:
    """A process that serves metrics."""

    process: subprocess.Popen[str]
    log: Path

    @cached_property
    def target(self) -> str:
        """Its host:port, as soon as it is ready.

        Raises:
            NotStartedError: it ended instead.
        """
        return _told_target(self.process, self.log)

    @property
    def url(self) -> str:
        """Where its pages are."""
        return f"http://{self.target}"


@contextlib.contextmanager
def server(
    *command: str, log: Path, signal_number: int = signal.SIGTERM, **environment: str
) -> Iterator[Server]:
    """A worker or exporter; it is ready when its `target` is known."""
    with (
        log.open("w") as errors,
        # In a session of its own: Ctrl-C is for us, who then end things in order.
        subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
            env=os.environ | environment,
        ) as process,
    ):
        try:
            yield Server(process, log)
        finally:
            _end(process, signal_number)


@contextlib.contextmanager
def prometheus(
    folder: Path, targets: Mapping[str, Sequence[str]], *, interval_s: float, port: int = 0
) -> Iterator[str]:
    """A Prometheus with the committed configuration, but these targets and this interval; its URL.

    Args:
        targets: host:port by job name; a job of the configuration without any is left out.
        port: 0 takes a free one.

    Raises:
        NotStartedError: it does not answer, or is not installed.
    """
    program = shutil.which("prometheus")
    if program is None:
        raise NotStartedError("prometheus is not installed (Debian: apt-get install prometheus)")
    config = configuration(targets, interval_s)
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{port or free_port()}"
    arguments = [
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with (
        (folder / "prometheus.log").open("w") as log,
        subprocess.Popen(
            [program, *arguments], stdout=log, stderr=log, text=True, start_new_session=True
        ) as process,
    ):
        try:
            _wait_until_ready(process, f"http://{address}/-/ready", folder / "prometheus.log")
            yield f"http://{address}"
        finally:
            _end(process, signal.SIGTERM)


def configuration(targets: Mapping[str, Sequence[str]], interval_s: float) -> dict[str, Any]:
    """The committed configuration with other targets and another interval."""
    config: dict[str, Any] = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    interval = f"{round(1000 * interval_s)}ms"
    config["global"] = {"scrape_interval": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(PROMETHEUS / name) for name in config["rule_files"]]
    config["scrape_configs"] = [
        {"job_name": job["job_name"], "static_configs": [{"targets": list(there)}]}
        for job in config["scrape_configs"]
        if (there := targets.get(job["job_name"]))
    ]
    # Whoever is paged is no business of a trial.
    config.pop("alerting", None)
    return config


def free_port() -> int:
    """A port that nobody listens on just now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _told_target(process: subprocess.Popen[str], log: Path) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://(\S+)/metrics", line)
    if found is None:
        raise NotStartedError(f"{' '.join(map(str, process.args))}: {_end_of(log)}")  # type: ignore[arg-type]
    return found[1]


def _wait_until_ready(process: subprocess.Popen[str], url: str, log: Path) -> None:
    ends_s = time.monotonic() + READY_S
    while time.monotonic() < ends_s and process.poll() is None:
        with (
            contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError),
            urllib.request.urlopen(url, timeout=5),  # noqa: S310
        ):
            return
        time.sleep(POLL_S)
    raise NotStartedError(f"{url} does not answer: {_end_of(log)}")


def _end(process: subprocess.Popen[str], signal_number: int) -> None:
    if process.poll() is not None:
        return
    process.send_signal(signal_number)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()


def _end_of(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-1000:].strip() or "it said nothing"
