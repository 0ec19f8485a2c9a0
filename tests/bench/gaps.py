"""How long the engine waits between two steps while its worker has a busy queue.

`python -m tests.bench.gaps [--requests 2000] [--model demo]`: a worker claims, leases and commits
as ever; its engine process notes when each step of the model begins and ends. The gap between the
end of one and the begin of the next is the loop's own: scheduling, text, messages, and whatever the
worker process delays. The share of it in all time is what bookkeeping costs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import quantiles
from typing import Any

from tests.faults.server import RedisServer

from shoal import Client, SamplingParams
from shoal.wire import GenerationRequest
from shoal_worker import engine_process
from shoal_worker.engine_process import EngineProcess
from shoal_worker.rq_worker import Worker
from shoal_worker.settings import read_settings

OUTPUT_VARIABLE = "GAPS_OUTPUT"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=2_000)
    parser.add_argument("--model", default="demo")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server:
        output = Path(folder) / "steps.json"
        os.environ[OUTPUT_VARIABLE] = str(output)
        settings = read_settings({"model": options.model, "burst": True})
        worker = Worker(
            settings,
            server.url,
            start_engine=lambda: EngineProcess(settings.engine, "warning", "tests.bench.gaps"),
        )
        with Client(server.url) as client:
            requests = [
                GenerationRequest(
                    prompt="the sea was calm " * (1 + i % 8),
                    sampling=SamplingParams(max_tokens=32),
                    service_class="bulk",
                )
                for i in range(options.requests)
            ]
            client.submit_many(requests, requests_per_job=8)
        worker.run(lambda _ready: None)
        print(_report(json.loads(output.read_text())))


def _report(steps: list[tuple[float, float]]) -> str:
    # The first and last steps wait for work to come and to run out.
    steps = steps[len(steps) // 20 : -len(steps) // 20]
    gaps = [later[0] - earlier[1] for earlier, later in itertools.pairwise(steps)]
    lengths = [end - begin for begin, end in steps]
    whole_s = steps[-1][1] - steps[0][0]
    cuts, lasts = quantiles(gaps, n=100), quantiles(lengths, n=100)
    return (
        f"{len(steps)} steps of {lasts[49] * 1000:.2f} ms in the median; gap {cuts[49] * 1000:.2f} "
        f"ms in the median, {cuts[98] * 1000:.2f} ms at p99: {100 * sum(gaps) / whole_s:.1f}% of "
        "the time"
    )


def _noted(step: Any, steps: list[tuple[float, float]]) -> Any:
    def run(*arguments: Any) -> Any:
        begin_s = time.perf_counter()
        try:
            return step(*arguments)
        finally:
            steps.append((begin_s, time.perf_counter()))

    return run


def _child() -> None:
    """The engine process, with a note of every step."""
    steps: list[tuple[float, float]] = []
    load = engine_process.load

    def noted_load(settings: Any) -> Any:
        loop, ready = load(settings)
        engine: Any = loop._engine
        engine.prefill, engine.decode = _noted(engine.prefill, steps), _noted(engine.decode, steps)
        return loop, ready

    engine_process.load = noted_load
    engine_process._main(sys.argv[1:])
    Path(os.environ[OUTPUT_VARIABLE]).write_text(json.dumps(steps))


if __name__ == "__main__":
    _child() if sys.argv[1:2] and sys.argv[1].isdecimal() else main()
