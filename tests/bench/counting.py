"""What counting costs, as a share of the time that the work itself takes.

`python -m tests.bench.counting [--model demo] [--requests 512] [--json]`. A run of the engine
through its serving loop, whose events are kept; then what is done for metrics alone is done again,
and timed: finding each step's tokens by queue, sending events through the pipe, counting them, and
scrapes every 15 s. Turning metrics on and off would not show it: runs differ by more.
"""

from __future__ import annotations

import argparse
import gzip
import json
import pickle
import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest

from shoal.wire import QUEUES, GenerationRequest, SamplingParams
from shoal_worker.engine_process import load
from shoal_worker.events import EngineLoaded, Event, StepRun
from shoal_worker.loop import _new_tokens_by_queue
from shoal_worker.messages import JobDone, Observed, Submit
from shoal_worker.metrics import PrometheusMetrics
from shoal_worker.sequence import Sequence as Row
from shoal_worker.sequence import SequenceKey
from shoal_worker.settings import EngineSettings

SCRAPE_EVERY_S = 15.0
PASSES = 5  # Each is timed so often, and the fastest is taken.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=512)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    took_s, events, lanes = _run(options.model, options.requests)
    report = _shares(took_s, events, lanes)
    print(json.dumps(report) if options.json else "\n".join(f"{k}: {v}" for k, v in report.items()))


def _run(model: str, num_requests: int) -> tuple[float, list[Event], dict[str, int]]:
    loop, ready = load(EngineSettings(model=model))
    requests = [
        GenerationRequest(
            prompt=list(range(1, 17 + i % 48)),
            sampling=SamplingParams(max_tokens=64, top_k=50, ignore_eos=True),
            service_class="bulk",
        ).model_dump()
        for i in range(num_requests)
    ]
    started_s = time.perf_counter()
    loop.submit(Submit("job", QUEUES[-1], {"v": 1, "requests": requests}, 0.0, 2))
    events: list[Event] = []
    done = False
    while not done:
        for message in loop.step():
            done |= isinstance(message, JobDone)
            if isinstance(message, Observed):
                events += message.events
    return time.perf_counter() - started_s, events, ready.lanes


def _shares(took_s: float, events: Sequence[Event], lanes: dict[str, int]) -> dict[str, Any]:
    steps = [event for event in events if isinstance(event, StepRun)]
    rows = [Row(SequenceKey("j", i, 0), (1,), SamplingParams(), 0, queue="q") for i in range(4096)]
    registry = CollectorRegistry()
    metrics = PrometheusMetrics(registry, model_name="m", queues=QUEUES, lanes=lanes)
    metrics(EngineLoaded("m", "f", "cpu", "float32", 1.0, lanes))

    def by_queue() -> None:
        for step in steps:
            some = rows[: step.rows]
            _new_tokens_by_queue(some, [len(row.output_token_ids) for row in some])

    def through_the_pipe() -> None:
        pickle.loads(pickle.dumps(Observed(tuple(events))))

    def count() -> None:
        for event in events:
            metrics(event)

    def scrape() -> None:
        gzip.compress(generate_latest(registry), compresslevel=1)

    costs_s = {
        "tokens by queue": _fastest(by_queue),
        "events through the pipe": _fastest(through_the_pipe),
        "counting": _fastest(count),
        "scrapes": _fastest(scrape) * took_s / SCRAPE_EVERY_S,
    }
    tokens = sum(step.rows if step.phase == "prefill" else step.tokens for step in steps)
    return {
        "took s": round(took_s, 2),
        "tokens a second": round(tokens / took_s),
        "steps": len(steps),
        **{f"{name}, % of it": round(100 * cost_s / took_s, 3) for name, cost_s in costs_s.items()},
        "all, % of it": round(100 * sum(costs_s.values()) / took_s, 3),
        "all, microseconds a step": round(1e6 * sum(costs_s.values()) / len(steps), 1),
    }


def _fastest(what: Callable[[], None]) -> float:
    times_s = []
    for _ in range(PASSES):
        started_s = time.perf_counter()
        what()
        times_s.append(time.perf_counter() - started_s)
    return min(times_s)


if __name__ == "__main__":
    main()
