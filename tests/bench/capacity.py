"""What one Redis carries: requests a second of many workers, its CPU and its bytes for each.

`python -m tests.bench.capacity [--workers 1,8,32] [--jobs 2000] [--json]`: workers without a model
(a scripted engine that answers at once) on one Redis with an append-only file. All jobs are queued
while the workers are suspended, then run; prompts and completions have 1,000 characters. Where
cores are few, workers and Redis share them, and the rate is theirs together; what Redis alone would
carry follows from the CPU time that it took for each request, as it does one thing at a time.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import redis
from rq.suspension import resume, suspend
from tests.bench.queue import _machine
from tests.conftest import wait_until
from tests.faults.server import RedisServer

from shoal import Client, GenerationRequest

CHARACTERS = 1_000
LETTERS = "etaoin shrdlu"
IDLE_S = 10.0
START_S = 180.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", default="1,8,32", help="numbers of processes, by commas")
    parser.add_argument("--jobs", type=int, default=2_000, help="jobs of one request")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report: dict[str, Any] = {"rows": []}
    for num_workers in map(int, options.workers.split(",")):
        with (
            RedisServer("--appendonly", "yes") as server,
            server.client() as connection,
            _workers(server.url, num_workers),
        ):
            report["machine"] = _machine(connection)
            idle = _idle(connection)
            for packed, num_jobs in ((1, options.jobs), (64, options.jobs // 8)):
                row = _run(server.url, connection, num_jobs, packed)
                report["rows"].append({"workers": num_workers} | row | idle)
    print(json.dumps(report) if options.json else _table(report))


@contextmanager
def _workers(url: str, number: int) -> Iterator[None]:
    """So many worker processes, registered and suspended."""
    with redis.Redis.from_url(url) as connection:
        suspend(connection)
    command = [sys.executable, "-m", "tests.scripted_engine", url, "--poll-s", "0.03"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(number)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline().startswith(b"ready")
        yield
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _idle(connection: redis.Redis) -> dict[str, float]:
    """What the waiting workers cost: commands a second and the share of a core."""
    resume(connection)
    time.sleep(2)  # They look for the end of a suspension once a second.
    before, began_s = _usage(connection), time.perf_counter()
    time.sleep(IDLE_S)
    after, took_s = _usage(connection), time.perf_counter() - began_s
    suspend(connection)
    time.sleep(2)
    return {
        "idle_commands_per_s": round((after["commands"] - before["commands"]) / took_s),
        "idle_cpu_percent": round(100 * (after["cpu_s"] - before["cpu_s"]) / took_s, 1),
    }


def _run(url: str, connection: redis.Redis, num_jobs: int, packed: int) -> dict[str, float]:
    rng = random.Random(0)
    requests = [
        GenerationRequest(prompt="".join(rng.choices(LETTERS, k=CHARACTERS)))
        for _ in range(num_jobs * packed)
    ]
    finished = "rq:finished:shoal-default"
    done_before = int(connection.zcard(finished))
    empty = _usage(connection)
    with Client(url) as client:
        jobs = client.submit_many(requests, requests_per_job=packed)
        queued = _usage(connection)
        began_s = time.perf_counter()
        resume(connection)
        wait_until(
            lambda: int(connection.zcard(finished)) == done_before + num_jobs, "all ran", START_S
        )
        took_s = time.perf_counter() - began_s
        ran = _usage(connection)
        suspend(connection)
        assert jobs[-1].result(timeout=1).text == str(requests[-1].prompt).upper()
        _read_all(client, [job.handle.job_id for job in jobs])
        read = _usage(connection)
    number = len(requests)
    cpu_s = read["cpu_s"] - empty["cpu_s"]
    return {
        "requests_per_job": packed,
        "requests_per_s": round(number / took_s),
        "redis_core_percent": round(100 * (ran["cpu_s"] - queued["cpu_s"]) / took_s),
        "redis_us_per_request": round(1e6 * cpu_s / number, 1),
        "requests_per_s_of_a_core": round(number / cpu_s),
        "bytes_queued": round((queued["bytes"] - empty["bytes"]) / number),
        "bytes_finished": round((ran["bytes"] - empty["bytes"]) / number),
        "aof_bytes": round((read["aof_bytes"] - empty["aof_bytes"]) / number),
    }


def _read_all(client: Client, job_ids: Sequence[str]) -> None:
    states = client.states(list(dict.fromkeys(job_ids)))
    assert all(state.is_final for state in states.values())


def _usage(connection: redis.Redis) -> dict[str, float]:
    facts: Any = connection.info()
    return {
        "cpu_s": facts["used_cpu_sys"] + facts["used_cpu_user"],
        "commands": facts["total_commands_processed"],
        "bytes": facts["used_memory_dataset"],
        "aof_bytes": facts["aof_current_size"],
    }


def _table(report: dict[str, Any]) -> str:
    columns = list(report["rows"][0])
    lines = [report["machine"], "| " + " | ".join(columns) + " |", "| ---: " * len(columns) + "|"]
    lines += ["| " + " | ".join(f"{row[c]:,}" for c in columns) + " |" for row in report["rows"]]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
