"""What the fault tests share: a server that they may mistreat, and workers to mistreat."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests.faults.processes import WorkerProcess
from tests.faults.server import RedisServer, require_server

from shoal import Client

StartWorker = Callable[..., WorkerProcess]


@pytest.fixture
def server() -> Iterator[RedisServer]:
    """An empty server of this test's own."""
    require_server()
    with RedisServer() as server:
        yield server


@pytest.fixture
def client(server: RedisServer) -> Iterator[Client]:
    """A client that goes straight to the server."""
    with Client(server.url) as client:
        yield client


@pytest.fixture
def start_worker(server: RedisServer, tmp_path: Path) -> Iterator[StartWorker]:
    """Starts a worker process that tells what it does and can be told to die somewhere."""
    with ExitStack() as stack:

        def start(url: str | None = None, *, ready: bool = True, **options: Any) -> WorkerProcess:
            options = {"lease_s": 1, "module": "tests.faults.worker", **options}
            worker = stack.enter_context(WorkerProcess(url or server.url, tmp_path, **options))
            if ready:
                worker.wait_ready()
            return worker

        yield start
