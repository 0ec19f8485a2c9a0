"""How long an urgent request waits beside a bulk run, with a real worker and the demo model.

`python -m tests.bench.mixed [--bulk 10000] [--urgent 200] [--model demo]`: one worker process, a
bulk run in jobs of 64 in `shoal-bulk`, and single requests one after the other in `shoal-high`;
first without the bulk work, then beside it. Times are the worker's own: from submission to the
start of the prefill, and of the prefill itself; a step's length is what the worker measured.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from tests.faults.server import RedisServer

from shoal import Client, SamplingParams
from shoal.wire import GenerationRequest

WORDS = [
    "the",
    "sea",
    "was",
    "calm",
    "that",
    "night",
    "and",
    "the",
    "old",
    "man",
    "sat",
    "by",
    "the",
    "fire",
    "waiting",
    "for",
    "news",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bulk", type=int, default=10_000, help="bulk requests")
    parser.add_argument("--urgent", type=int, default=200, help="urgent requests in each phase")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with (
        RedisServer() as server,
        _worker(server.url, options.model) as metrics_url,
        Client(server.url) as client,
    ):
        list(client.map(_prompts(64), max_tokens=8))
        alone = _urgent(client, options.urgent)
        jobs = client.submit_many(
            [
                GenerationRequest(
                    prompt=prompt, service_class="bulk", sampling=SamplingParams(max_tokens=64)
                )
                for prompt in _prompts(options.bulk)
            ],
            queue="shoal-bulk",
            requests_per_job=64,
        )
        beside = _urgent(client, options.urgent)
        num_left = sum(not job.done() for job in jobs[:: len(jobs) // 50])
        assert num_left, "the bulk run ended before the urgent requests did: give it more"
        steps = _steps(metrics_url)
    report = {"machine": platform.processor() or platform.machine(), "alone": alone}
    report |= {"beside bulk": beside, "steps": steps}
    print(json.dumps(report) if options.json else _table(report))


def _prompts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        yield " ".join(rng.choices(WORDS, k=rng.randint(8, 60)))


def _urgent(client: Client, count: int) -> dict[str, list[float]]:
    """Median and 99th percentile, in milliseconds, of time in queue and of the prefill."""
    queued, prefill = [], []
    for prompt in _prompts(count):
        result = client.submit(prompt, max_tokens=4, queue="shoal-high").result(timeout=120)
        queued.append(result.timing.queue_s * 1000)
        prefill.append(result.timing.prefill_s * 1000)
        time.sleep(0.02)  # Between requests: an idle worker is part of what is measured.
    return {"queue_ms": _p50_p99(queued), "prefill_ms": _p50_p99(prefill)}


def _p50_p99(values: list[float]) -> list[float]:
    cuts = quantiles(values, n=100)
    return [round(cuts[49], 1), round(cuts[98], 1)]


def _steps(metrics_url: str) -> dict[str, float]:
    """Mean milliseconds of a step, by phase and lane."""
    with urllib.request.urlopen(f"{metrics_url}") as reply:
        text = reply.read().decode()
    sums: dict[str, list[float]] = {}
    for family in text_string_to_metric_families(text):
        if family.name == "shoal_step_duration_seconds":
            for sample in family.samples:
                labels = sample.labels
                key = f"{labels.get('phase', 'step')} {labels.get('lane', '')}"
                entry = sums.setdefault(key, [0.0, 0.0])
                entry[0] += sample.value if sample.name.endswith("_sum") else 0.0
                entry[1] += sample.value if sample.name.endswith("_count") else 0.0
    return {name: round(1000 * total / num, 1) for name, (total, num) in sums.items() if num}


@contextmanager
def _worker(url: str, model: str) -> Iterator[str]:
    command = [
        str(Path(sys.executable).with_name("shoal")),
        "worker",
        "--model",
        model,
        "--redis",
        url,
    ]
    with subprocess.Popen(
        [*command, "--metrics-port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready"), line
        try:
            yield line.partition("metrics at ")[2].partition(",")[0]
        finally:
            process.kill()


def _table(report: dict[str, Any]) -> str:
    lines = [f"{report['machine']}: milliseconds, median and p99"]
    for phase in ("alone", "beside bulk"):
        queue, prefill = report[phase]["queue_ms"], report[phase]["prefill_ms"]
        lines.append(
            f"{phase:12} in queue {queue[0]:7} {queue[1]:7}   prefill {prefill[0]:7} {prefill[1]:7}"
        )
    lines += [f"mean step, {name}: {value} ms" for name, value in report["steps"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
