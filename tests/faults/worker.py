"""A scripted worker that tells what it moves and can be told to die at a named point.

`python -m tests.faults.worker URL --child [flags of tests.scripted_engine]`. Each event about jobs
is printed as `moved KIND NUMBER`; FAULT_POINT, read by `points`, says where to die.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from tests.faults import points
from tests.scripted_engine import DELAY_VARIABLE

from shoal_worker.engine_process import EngineProcess
from shoal_worker.events import Event, JobsMoved, RedisRoundTrip
from shoal_worker.rq_worker import Worker
from shoal_worker.settings import read_settings

POLL_S = 0.005


def tell(event: Event) -> None:
    """Print what tests look for."""
    if isinstance(event, JobsMoved):
        print("moved", event.kind, event.jobs, flush=True)
    elif isinstance(event, RedisRoundTrip) and event.failed:
        print("failed", event.command, flush=True)


def main() -> None:
    """Run the worker; the flags are those of `tests.scripted_engine`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("redis_url")
    parser.add_argument("--child", action="store_true")
    parser.add_argument("--delay-s", default="0")
    for flag in ("name", "queues", "lease-s", "drain-timeout-s", "max-in-flight"):
        parser.add_argument(f"--{flag}")
    options = vars(parser.parse_args())
    url, _ = options.pop("redis_url"), options.pop("child")
    os.environ[DELAY_VARIABLE] = options.pop("delay_s")  # Read by the engine's process.
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("rq.worker").setLevel(logging.WARNING)
    points.install()
    settings = read_settings({"model": "scripted", "poll_s": POLL_S, **options})
    worker = Worker(
        settings,
        url,
        subscribers=(tell,),
        start_engine=lambda: EngineProcess(settings.engine, "info", "tests.scripted_child"),
    )
    sys.exit(worker.run(lambda ready: print("ready", ready.model_name, flush=True)))


if __name__ == "__main__":
    main()
