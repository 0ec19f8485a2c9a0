"""Tokens a second on the whole path: client, Redis, worker, engine and back.

`python -m tests.bench.through_redis [--shape gpt2-small] [--requests 4096] [--json]`: a model of
that shape with random weights, served by a real worker with its default lanes; the requests of W1
(prompts of 16 to 128 tokens, 64 new ones) in jobs of 64. Counted from the first submission to the
last result, after a warm-up of one eighth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.faults.server import RedisServer

from shoal import Client
from shoal_worker.bench.random_models import SHAPES, random_model
from shoal_worker.bench.workloads import requests

PACKED = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=list(SHAPES), default="gpt2-small")
    parser.add_argument("--requests", type=int, default=4_096)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, RedisServer() as server:
        saved = random_model(options.shape, "cpu")
        saved.model.save_pretrained(folder)
        saved.tokenizer.save_pretrained(folder)
        with _worker(server.url, folder) as ready, Client(server.url) as client:
            _run(client, options.requests // 8)
            report = {"worker": ready, **_run(client, options.requests)}
    print(json.dumps(report) if options.json else "\n".join(f"{k}: {v}" for k, v in report.items()))


def _run(client: Client, num_requests: int) -> dict[str, Any]:
    whole = requests("W1", num_requests, 50_257)
    begin_s = time.perf_counter()
    jobs = client.submit_many(whole, queue="shoal-bulk", requests_per_job=PACKED)
    submitted_s = time.perf_counter() - begin_s
    num_tokens = sum(job.result(timeout=300).usage.completion_tokens for job in jobs)
    took_s = time.perf_counter() - begin_s
    return {
        "requests": num_requests,
        "new tokens": num_tokens,
        "submitted in s": round(submitted_s, 2),
        "took s": round(took_s, 2),
        "tokens a second": round(num_tokens / took_s),
    }


@contextmanager
def _worker(url: str, model: str) -> Iterator[str]:
    command = [sys.executable, "-m", "shoal_worker", "--model", model, "--redis", url]
    with subprocess.Popen(
        [*command, "--metrics-port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("ready"), line
        try:
            yield line.strip()
        finally:
            process.kill()


if __name__ == "__main__":
    main()
