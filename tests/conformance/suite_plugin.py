"""A pytest plugin for RQ's own tests: our workers in the place of RQ's, our server, and the count.

Loaded with `-p` before the tests import anything; see `suite.py`, which sets the variables.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tomllib
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redis.connection
import rq
import rq.worker

from shoal_worker.rq_lifecycle import Lifecycle

RQ_S_PORT = 6379  # What the tests connect to, by default and by name.

# Not `tests.conformance`: that name belongs to the tests that are run.
workers: Any = importlib.import_module("lifecycle_worker")
num_claimed: Counter[str] = Counter()
outcomes: Counter[str] = Counter()
failed: list[str] = []


def pytest_configure() -> None:
    """Swap, before any test module is imported."""
    for module in (rq, rq.worker):
        module.Worker = workers.LifecycleWorker  # type: ignore[attr-defined]
        module.SimpleWorker = workers.LifecycleSimpleWorker  # type: ignore[attr-defined]
    # test_worker.py imports it for one test of processes that are forked for a job.
    sys.modules.setdefault("psutil", ModuleType("psutil"))
    _redirect(int(os.environ["SUITE_PORT"]))
    _count_claims()


def _count_claims() -> None:
    """Add a byte to a file for each claimed job: workers in forks of this process count too."""
    original = Lifecycle.claim
    counter = os.open(os.environ["SUITE_CLAIMS"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def claim(self: Lifecycle, *args: Any, **kwargs: Any) -> list[Any]:
        claimed = original(self, *args, **kwargs)
        os.write(counter, b"." * len(claimed))
        return claimed

    Lifecycle.claim = claim  # type: ignore[method-assign]


def _redirect(port: int) -> None:
    """Let connections to Redis's own port go to ours: whoever has a server there keeps it."""
    original: Any = redis.connection.Connection.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if self.port == RQ_S_PORT:
            self.port = port

    redis.connection.Connection.__init__ = init  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is listed with a reason; what is listed must be there."""
    listed = tomllib.loads(Path(os.environ["SUITE_DESELECTED"]).read_text())["deselected"]
    files = {item.nodeid.split("::")[0] for item in items}
    here = {test_id for test_id in listed if test_id.split("::")[0] in files}
    if unknown := here - {item.nodeid for item in items}:
        raise pytest.UsageError(f"deselected, but not there: {sorted(unknown)}")
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in here])
    outcomes["deselected"] = len(here)
    items[:] = [item for item in items if item.nodeid not in here]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """Count what a test ran through the lifecycle."""
    counter = Path(os.environ["SUITE_CLAIMS"])
    before = counter.stat().st_size
    try:
        yield
    finally:
        num_claimed[item.nodeid.split("::")[0]] += counter.stat().st_size - before


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Count tests by how they ended."""
    if report.failed:
        failed.append(f"{report.nodeid} ({report.when})")
    elif report.when == "call" or report.skipped:
        outcomes[report.outcome] += 1


def pytest_sessionfinish() -> None:
    """Say what was counted."""
    report = {"rq": rq.__version__, "failed": failed, "claimed": num_claimed, **outcomes}
    Path(os.environ["SUITE_REPORT"]).write_text(json.dumps(report))
