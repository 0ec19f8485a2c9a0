"""Kills workers and engines at random while requests are served, and counts what comes back.

`python -m tests.faults.kill_run --requests 20000 --kills 500 [--queues 3] [--lease-s 2] [--json]`
starts a Redis of its own, some scripted workers with engines of their own, and RQ's `rq info` in a
loop. The exit code is 1 on any violation: a request lost or answered twice, a job failed, anything
left in Redis, a worker that ended by itself, a recovery over the lease and ten seconds.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import redis
from tests.faults import audit
from tests.faults.killer import Killer, Pool
from tests.faults.processes import ROOT, WorkerProcess
from tests.faults.recoveries import Recoveries
from tests.faults.report import Report
from tests.faults.server import RedisServer

from shoal import Client
from shoal.client import Job
from shoal.wire import QUEUES

JOB_SIZES = (1, 1, 1, 2, 4, 8, 16, 32, 64)
RECOVERY_LIMIT_S = 10.0  # on top of the lease
TICK_S = 0.01


@dataclass(frozen=True, slots=True)
class Options:
    """What one run does."""

    requests: int = 1_000
    kills: int = 20
    queues: int = 1
    lease_s: float = 1.0
    workers: int = 4
    delay_s: float = 0.5
    seed: int = 0


class Supply:
    """Submits jobs of mixed sizes, in step with the kills so that each finds some at work."""

    def __init__(self, client: Client, options: Options) -> None:
        self._client = client
        self._options = options
        self._random = random.Random(options.seed)
        self._queues = QUEUES[: options.queues] if options.queues > 1 else ("shoal-default",)
        self.jobs: list[Job] = []

    @property
    def is_spent(self) -> bool:
        """Whether all requests are submitted."""
        return len(self.jobs) >= self._options.requests

    def step(self, num_kills: int) -> None:
        """Submit a job, if this kill's share is not spent or nothing is left to work on."""
        share = self._options.requests * (num_kills + 1) / max(1, self._options.kills)
        in_flight = self._num_in_flight()
        # Twice as many as there are workers: some wait in the queue, most are held.
        enough = in_flight >= 2 * self._options.workers
        if self.is_spent or (in_flight and (enough or len(self.jobs) >= share)):
            return
        size = min(self._random.choice(JOB_SIZES), self._options.requests - len(self.jobs))
        prompts = [f"prompt {len(self.jobs) + i}" for i in range(size)]
        queue = self._random.choice(self._queues)
        self.jobs += self._client.submit_many(prompts, queue=queue, requests_per_job=size)

    def _num_in_flight(self) -> int:
        with self._client.redis.pipeline(transaction=False) as pipeline:
            for queue in self._queues:
                pipeline.llen(f"rq:queue:{queue}")
            pipeline.zcard(audit.LEASES_KEY)
            return int(sum(pipeline.execute()))


def run(options: Options) -> Report:
    """One run, from an empty server to the audit."""
    with RedisServer() as server, tempfile.TemporaryDirectory() as folder:
        started_s = time.monotonic()
        with looking(server.url) as looks, Client(server.url) as client:
            report = _run(options, server, client, Path(folder))
        report.rq_info_looks, report.rq_info_errors = looks[0], looks[1]
        report.duration_s = time.monotonic() - started_s
    return report


def _run(options: Options, server: RedisServer, client: Client, folder: Path) -> Report:
    def start() -> WorkerProcess:
        return WorkerProcess(server.url, folder, lease_s=options.lease_s, delay_s=options.delay_s)

    limit_s = options.lease_s + RECOVERY_LIMIT_S
    own = server.client()
    recoveries = Recoveries(own)
    pool = Pool(start, options.workers)
    killer = Killer(
        pool,
        own,
        recoveries,
        seed=options.seed,
        max_kills=options.kills,
        mean_gap_s=options.delay_s / 2,
        max_pause_s=limit_s,
    )
    supply = Supply(client, options)
    try:
        _strike_and_serve(options, pool, killer, recoveries, supply)
        report = _audited(options, own, supply, recoveries, killer)
        pool.stop()
        report.violations += [f"after the workers left: {left}" for left in audit.leftovers(own)]
        report.violations += pool.surprises
        return report
    finally:
        pool.kill()
        own.close()


def _strike_and_serve(
    options: Options, pool: Pool, killer: Killer, recoveries: Recoveries, supply: Supply
) -> None:
    """Until all kills are done, all requests submitted, and nobody waits to run again."""
    quiet_since_s = time.monotonic()
    seen: Any = None
    while not (killer.is_done and supply.is_spent and not recoveries.unfinished()):
        pool.tend()
        recoveries.poll()
        killer.step()
        supply.step(killer.num_kills.total())
        if (now := (killer.num_kills.total(), len(supply.jobs))) != seen:
            seen, quiet_since_s = now, time.monotonic()
        if time.monotonic() - quiet_since_s > 3 * (options.lease_s + RECOVERY_LIMIT_S):
            return  # Something is stuck; the audit says what.
        time.sleep(TICK_S)


def _audited(
    options: Options, own: redis.Redis, supply: Supply, recoveries: Recoveries, killer: Killer
) -> Report:
    limit_s = options.lease_s + RECOVERY_LIMIT_S
    lost = audit.lost_requests(supply.jobs, timeout_s=3 * limit_s)
    recoveries.poll()
    job_ids = audit.job_ids_of(supply.jobs)
    entries = audit.result_entries(own, job_ids)
    sizes = {job.handle.job_id: job.handle.num_requests for job in supply.jobs}
    report = Report(
        requests=len(supply.jobs),
        jobs=len(job_ids),
        kills=dict(killer.num_kills),
        kills_on_holders=killer.num_on_holders,
        pauses=killer.num_pauses,
        jobs_hit=killer.hits.total(),
        requests_hit=sum(sizes[job_id] * hits for job_id, hits in killer.hits.items()),
        unharmed=recoveries.num_unharmed,
        lost=len(lost),
        duplicates=sum(count > 1 for count in entries.values()),
        recovery_s=recoveries.waited_s,
        recovery_limit_s=limit_s,
    )
    report.violations += lost[:10]
    report.violations += [f"job {job} has {n} results" for job, n in entries.items() if n != 1]
    report.violations += recoveries.unfinished()
    report.violations += audit.settle(own, timeout_s=5.0)
    if killer.num_kills.total() < options.kills:
        report.violations.append(f"only {killer.num_kills.total()} of {options.kills} kills")
    return report


@contextmanager
def looking(url: str) -> Iterator[list[int]]:
    """`rq info` in a loop; the list is filled at the end: looks, and looks that failed."""
    counts: list[int] = []
    with subprocess.Popen(
        [sys.executable, "-m", "tests.faults.rq_info", url],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        text=True,
    ) as process:
        try:
            yield counts
        finally:
            process.terminate()
            assert process.stdout is not None
            counts += [int(word) for word in process.stdout.read().split()] or [0, 0]


def main() -> None:
    """Run as asked on the command line, print the report, and leave with its verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in Options.__dataclass_fields__.items():
        kind = type(default.default)
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=kind, default=default.default, help=f"{default.default}")
    parser.add_argument("--json", action="store_true", help="one JSON object, not a table")
    values = vars(parser.parse_args())
    as_json = values.pop("json")
    report = run(Options(**values))
    print(report.json() if as_json else report.table())
    sys.exit(1 if report.all_violations() else 0)


if __name__ == "__main__":
    main()
