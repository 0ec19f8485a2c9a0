"""Kills workers and engines at random moments, and keeps a set of workers running.

Each fault freezes its worker first: what the worker held at that very moment is then read from
Redis, so that a kill which hit nobody's job is never counted as one.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable

import redis
from tests.faults.processes import WorkerProcess
from tests.faults.recoveries import Fault, Recoveries

# The product ends a job that has lost what ran it six times, by design. Here every job must
# finish, so none is hit more often than this.
MAX_HITS_PER_JOB = 4
# The product's own limit: a worker whose engine died so often leaves, with an error.
MAX_ENGINE_RESTARTS = 3
MAX_SURPRISES = 5
ENGINE_SHARE, BYSTANDER_SHARE, PAUSE_SHARE = 0.3, 0.1, 0.1


class Pool:
    """So many workers, each replaced when it has ended.

    Attributes:
        surprises: ends that no fault of ours explains, each with the end of the worker's log.
    """

    def __init__(self, start: Callable[[], WorkerProcess], num_workers: int) -> None:
        self._start = start
        self._workers = [start() for _ in range(num_workers)]
        self.surprises: list[str] = []

    @property
    def workers(self) -> list[WorkerProcess]:
        """Those that run."""
        return [worker for worker in self._workers if worker.exit_code is None]

    def tend(self) -> None:
        """Replace what has ended."""
        for index, worker in enumerate(self._workers):
            assert len(self.surprises) < MAX_SURPRISES, "\n".join(self.surprises)
            if worker.exit_code is not None:
                self._judge(worker)
                self._workers[index] = self._start()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Drain them all."""
        for worker in self.workers:
            worker.terminate()
        for worker in self._workers:
            if worker.killed:
                continue
            worker.wait_exit(timeout_s)
            self._judge(worker)

    def kill(self) -> None:
        """End them all at once."""
        for worker in self.workers:
            worker.kill()

    def _judge(self, worker: WorkerProcess) -> None:
        if worker.killed or worker.exit_code == 0 or worker.num_engine_kills > MAX_ENGINE_RESTARTS:
            return
        tail = "\n".join(worker.log.splitlines()[-6:])
        self.surprises.append(f"{worker.name} ended by itself, code {worker.exit_code}: {tail}")


class Killer:
    """So many SIGKILLs at random moments, and stops past the lease among them.

    Attributes:
        num_kills: SIGKILLs so far; num_on_holders: those whose worker held jobs.
        num_pauses: workers that stood still until others ran their jobs.
        hits: for each job, how often it lost what ran it.
    """

    def __init__(
        self,
        pool: Pool,
        client: redis.Redis,
        recoveries: Recoveries,
        *,
        seed: int,
        max_kills: int,
        mean_gap_s: float,
        max_pause_s: float,
    ) -> None:
        self._pool = pool
        self._client = client
        self._recoveries = recoveries
        self._random = random.Random(seed)
        self._max_kills = max_kills
        self._mean_gap_s = mean_gap_s
        self._max_pause_s = max_pause_s
        self._next_s = 0.0
        # Drawn once for each fault: trying again for lack of a victim must not favour any kind.
        self._kind = self._random.random()
        self._paused: list[tuple[WorkerProcess, dict[str, str], float]] = []
        self.num_kills: Counter[str] = Counter()
        self.num_on_holders = 0
        self.num_pauses = 0
        self.hits: Counter[str] = Counter()

    @property
    def is_done(self) -> bool:
        """Whether all kills are done and nobody stands still."""
        return self._is_spent and not self._paused

    @property
    def _is_spent(self) -> bool:
        return self.num_kills.total() >= self._max_kills

    def step(self) -> None:
        """One fault, if it is time for one."""
        self._continue_the_paused()
        now_s = time.monotonic()
        if self._is_spent or now_s < self._next_s:
            return
        if self._strike():
            self._kind = self._random.random()
            self._next_s = now_s + self._random.uniform(0, 2 * self._mean_gap_s)

    def _strike(self) -> bool:
        """A fault of random kind on a random worker; False if nobody was to be hit."""
        stopped = [worker for worker, *_ in self._paused]
        able = [worker for worker in self._pool.workers if worker not in stopped]
        holders = [worker for worker in able if worker.held(self._client)]
        if not holders:
            return False
        if self._kind < BYSTANDER_SHARE:
            # Whatever it does: starting, idle or busy.
            return self._hit(self._random.choice(able), "worker")
        worker, kind = self._random.choice(holders), self._kind - BYSTANDER_SHARE
        if kind < ENGINE_SHARE:
            return self._hit(worker, "engine")
        is_pause = kind < ENGINE_SHARE + PAUSE_SHARE and len(able) > 1
        return self._hit(worker, "pause" if is_pause else "worker")

    def _hit(self, worker: WorkerProcess, fault: Fault) -> bool:
        worker.freeze()
        held = worker.held(self._client)
        engine = worker.engine_pid()
        if any(self.hits[job_id] >= MAX_HITS_PER_JOB for job_id in held):
            worker.go_on()
            return False
        if fault == "engine" and engine is None:
            worker.go_on()
            return False
        self.hits.update(held.keys())
        self._recoveries.watch(fault, held)
        if fault == "pause":
            self.num_pauses += 1
            self._paused.append((worker, held, time.monotonic()))
            return True
        self.num_kills[fault] += 1
        self.num_on_holders += bool(held)
        if engine is not None and fault == "engine":
            worker.kill_engine(engine)
            worker.go_on()
        else:
            worker.kill()
        return True

    def _continue_the_paused(self) -> None:
        for pause in list(self._paused):
            worker, held, since_s = pause
            too_long = time.monotonic() - since_s > self._max_pause_s
            if too_long or not self._recoveries.waiting(held):
                self._paused.remove(pause)
                worker.go_on()
