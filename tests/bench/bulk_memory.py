"""What a bulk run of very many short rows costs beside the model: memory and rows a second.

`python -m tests.bench.bulk_memory [--rows 1000000] [--json]`: `shoal bulk` as a command, a worker
whose engine answers at once, a Redis of its own. The producer's memory is its greatest resident
set, Redis's its peak (INFO memory), each beside what it was before the first row.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.faults.fleet import BULK
from tests.faults.processes import ROOT
from tests.faults.server import RedisServer

MIB = 1024 * 1024
IN_FLIGHT = 1_024  # Of the worker.
IDLE = "import shoal.cli.bulk, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"


def main() -> None:
    """Run as asked on the command line and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    report = measured(options.rows, options.workers)
    print(json.dumps(report) if options.json else "\n".join(f"{k}: {v}" for k, v in report.items()))


def measured(rows: int, num_workers: int) -> dict[str, Any]:
    """One run's figures."""
    with RedisServer() as server, tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "in.txt"), Path(folder, "out.jsonl")
        with source.open("w") as file:
            file.writelines(f"a short prompt, number {i}\n" for i in range(rows))
        workers = [_worker(server.url) for _ in range(num_workers)]
        try:
            with server.client() as connection:
                connection.config_resetstat()
                before = _memory(connection, "used_memory")
                took_s, rss_bytes, summary = _bulk(server.url, source, output)
                peak = _memory(connection, "used_memory_peak")
                num_left = connection.dbsize()
        finally:
            for worker in workers:
                worker.kill()
    assert (summary["complete"], summary["rows"]) == (True, rows), summary
    return {
        "rows": rows,
        "rows a second": round(rows / summary["wall_s"]),
        "seconds in all, reading the input twice": round(took_s, 1),
        "producer, MiB at most": round(rss_bytes / MIB, 1),
        "producer that does nothing, MiB": round(_idle_bytes() / MIB, 1),
        "Redis, MiB over its start at most": round((peak - before) / MIB, 1),
        "keys left in Redis": num_left,
        "output, MiB": None if not rows else round(_size(summary) / MIB, 1),
    }


def _bulk(url: str, source: Path, output: Path) -> tuple[float, int, dict[str, Any]]:
    command = ["bulk", str(source), "-o", str(output), "--redis", url, "--max-tokens", "16"]
    started_s = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", BULK, *command, "--json"],
        stdout=subprocess.PIPE,
        cwd=ROOT,
    )
    assert process.stdout is not None
    summary = json.loads(process.stdout.read())
    _pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    summary["output_bytes"] = output.stat().st_size
    return time.perf_counter() - started_s, usage.ru_maxrss * 1024, summary


def _size(summary: dict[str, Any]) -> int:
    return int(summary["output_bytes"])


def _idle_bytes() -> int:
    done = subprocess.run(
        [sys.executable, "-c", IDLE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout) * 1024


def _worker(url: str) -> subprocess.Popen[str]:
    module = [sys.executable, "-m", "tests.scripted_engine", url]
    command = [*module, "--child", f"--max-in-flight={IN_FLIGHT}"]
    worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert worker.stdout is not None
    assert worker.stdout.readline().startswith("ready")
    return worker


def _memory(connection: Any, name: str) -> int:
    return int(connection.info("memory")[name])


if __name__ == "__main__":
    main()
