"""What the queue's side costs, without a model: jobs a second beside RQ's own worker, and idling.

`python -m tests.bench.queue [--rounds 5] [--jobs 2000] [--json]`: our worker with an engine that
answers at once, and RQ's SimpleWorker with a function that returns the same, take turns on one
Redis. Medians of the rounds; ratios are of medians taken in one run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import redis
from rq import Queue, SimpleWorker
from rq.serializers import JSONSerializer
from tests.faults.server import RedisServer
from tests.scripted_engine import ScriptedEngine, scripted_worker

from shoal import Client
from shoal.wire import GenerationRequest
from shoal_worker.messages import JobDone, Submit
from shoal_worker.rq_lifecycle import Lifecycle
from shoal_worker.rq_outcomes import Room, Succeeded
from shoal_worker.rq_private import RegisteredWorker

IN_FLIGHT = 128
PACKED = 64
POLL_S = 0.03  # The worker's default.


def answer(argument: dict[str, Any]) -> dict[str, Any]:
    """What RQ's worker runs: the result that the scripted engine gives."""
    engine = ScriptedEngine()
    engine.receive(0)
    engine.send(Submit("job", "q", argument, 0.0, 0))
    [done] = engine.receive(0)
    assert isinstance(done, JobDone)
    return done.result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    with RedisServer() as server, redis.Redis.from_url(server.url) as connection:
        report: dict[str, Any] = {"machine": _machine(connection)}
        report["jobs of one request"] = _side_by_side(server.url, options.jobs, 1, options.rounds)
        report[f"jobs of {PACKED}"] = _side_by_side(
            server.url, options.jobs // 4, PACKED, options.rounds
        )
        report["calls of a batch"] = {
            size: _calls_of_a_batch(connection, size) for size in (1, 8, 32, 128, 256)
        }
        report["idle"] = _idle(server.url)
        report["bytes of a queued request"] = _bytes_queued(connection)
    print(json.dumps(report) if options.json else _table(report))


def _machine(connection: redis.Redis) -> str:
    server: Any = connection.info("server")
    return (
        f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, "
        f"Redis {server['redis_version']}, rq {version('rq')}, redis-py {version('redis')}"
    )


def _side_by_side(url: str, num_jobs: int, packed: int, rounds: int) -> dict[str, float]:
    """Requests a second of both workers."""
    ours, stock = [], []
    for _ in range(rounds):
        ours.append(_rate(url, num_jobs, packed, lambda: _run_ours(url, packed)))
        stock.append(_rate(url, num_jobs // 4, packed, lambda: _run_stock(url)))
    return {
        "ours": round(median(ours)),
        "SimpleWorker": round(median(stock)),
        "ratio": round(median(ours) / median(stock), 1),
    }


def _rate(url: str, num_jobs: int, packed: int, run: Callable[[], None]) -> float:
    with redis.Redis.from_url(url) as connection, Client(url) as client:
        connection.flushall()
        requests = [GenerationRequest(prompt=f"prompt {i}") for i in range(num_jobs * packed)]
        jobs = client.submit_many(requests, requests_per_job=packed)
        begin_s = time.perf_counter()
        run()
        took_s = time.perf_counter() - begin_s
        assert jobs[-1].result(timeout=1).text == f"PROMPT {len(requests) - 1}"
    return len(requests) / took_s


def _run_ours(url: str, packed: int) -> None:
    scripted_worker(url, burst=True, max_in_flight=IN_FLIGHT * packed).run(lambda _ready: None)


def _run_stock(url: str) -> None:
    # RQ imports a job's function by its name; this is what `shoal.generate` is for it.
    import shoal  # noqa: PLC0415

    shoal.generate = answer  # type: ignore[attr-defined]
    with redis.Redis.from_url(url) as connection:
        queue = Queue("shoal-default", connection=connection, serializer=JSONSerializer)
        worker = SimpleWorker([queue], connection=connection, serializer=JSONSerializer)
        worker.work(burst=True, logging_level="ERROR")


def _calls_of_a_batch(connection: redis.Redis, size: int) -> int:
    """Requests to Redis that claim, renew and commit so many jobs."""
    connection.flushall()
    queue = Queue("q", connection=connection, serializer=JSONSerializer)
    queue.enqueue_many([Queue.prepare_data("f", args=(1,), description="d") for _ in range(size)])
    worker = RegisteredWorker(["q"], name="w", connection=connection, serializer=JSONSerializer)
    lifecycle = Lifecycle(worker, lease_s=30)
    for script in (lifecycle._claim, lifecycle._renew, lifecycle._commit):
        connection.script_load(script.script)
    connection.config_resetstat()
    claimed = lifecycle.claim(Room(size, 1_000_000))
    assert len(claimed) == size
    lifecycle.renew(claimed)
    assert all(lifecycle.commit([Succeeded(one, 1) for one in claimed]))
    stats: Any = connection.info("commandstats")
    return int(stats["cmdstat_evalsha"]["calls"])


def _idle(url: str) -> dict[str, float]:
    """A worker with an empty queue: milliseconds to a result, and its share of a core."""
    rng = random.Random(0)
    with _worker(url) as pid, Client(url) as client:
        waits = []
        for _ in range(100):
            time.sleep(rng.uniform(0.05, 0.1))  # To arrive at any time between two looks.
            begin_s = time.perf_counter()
            client.submit("p").result(timeout=10)
            waits.append((time.perf_counter() - begin_s) * 1000)
        begin_s, cpu_s = time.perf_counter(), _cpu_s(pid)
        time.sleep(10)
        share = (_cpu_s(pid) - cpu_s) / (time.perf_counter() - begin_s)
    cuts = quantiles(waits, n=100)
    return {
        "result_ms_p50": round(cuts[49], 1),
        "result_ms_p99": round(cuts[98], 1),
        "cpu_percent": round(100 * share, 2),
    }


@contextmanager
def _worker(url: str) -> Iterator[int]:
    command = [sys.executable, "-m", "tests.scripted_engine", url, f"--poll-s={POLL_S}", "--child"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("ready")
        try:
            yield process.pid
        finally:
            process.kill()


def _cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _bytes_queued(connection: redis.Redis) -> dict[str, int]:
    """Bytes in Redis for a request of 1,000 characters that waits, alone and packed."""
    sizes = {}
    for packed in (1, PACKED):
        connection.flushall()
        before: Any = connection.info("memory")
        kwargs: Any = connection.get_connection_kwargs()
        with Client(f"redis://{kwargs['host']}:{kwargs['port']}/0") as client:
            rng = random.Random(0)
            letters = "etaoin shrdlu"
            requests = [
                GenerationRequest(prompt="".join(rng.choices(letters, k=1_000)))
                for _ in range(PACKED * 20)
            ]
            client.submit_many(requests, requests_per_job=packed)
        after: Any = connection.info("memory")
        grown = after["used_memory_dataset"] - before["used_memory_dataset"]
        sizes[f"in jobs of {packed}"] = round(grown / len(requests))
    return sizes


def _table(report: dict[str, Any]) -> str:
    lines = [report["machine"]]
    for name in ("jobs of one request", f"jobs of {PACKED}"):
        row = report[name]
        lines.append(
            f"{name:20} {row['ours']:>8,} requests/s   SimpleWorker {row['SimpleWorker']:>6,}   "
            f"{row['ratio']}x"
        )
    calls = ", ".join(f"{size}: {num}" for size, num in report["calls of a batch"].items())
    lines.append(f"requests to Redis that claim, renew and commit a batch of {calls}")
    idle = report["idle"]
    lines.append(
        f"idle: submit to result {idle['result_ms_p50']} ms in the median, "
        f"{idle['result_ms_p99']} ms at p99; {idle['cpu_percent']}% of a core"
    )
    queued = report["bytes of a queued request"]
    lines.append(f"bytes of a queued request of 1,000 characters: {queued}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
