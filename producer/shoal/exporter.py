"""Queue metrics for Prometheus: what Redis holds, read anew at each scrape.

Owns names, labels and help texts of what is seen from outside the workers, and how a Redis that is
away shows. Run it once for a Redis: from two places, sums over them count twice. Raw reads only
(`shoal.status`): RQ's own registry calls clean up, which fails or retries other people's jobs.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from threading import Lock

import redis
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from shoal.bulk.run_state import RunState
from shoal.errors import ShoalError
from shoal.redis_url import connect, redis_errors
from shoal.server_state import ServerState, read_server_state, server_state
from shoal.status import QueueState, WorkerState, read_queues_and_workers, read_runs
from shoal.waiting import read_waiting_requests

PREFIX = "shoal_"
WORKER_STATES = ("starting", "idle", "busy", "suspended", "gone")
RUN_ROWS = ("done", "failed", "waiting")
MAX_RUNS = 50  # The newest: each is a few series, and leaves an hour after it last told of itself.
GONE_S = 30.0  # A worker of ours beats every second; clocks of hosts may differ by a few.
READ_TIMEOUT_S = 2.0  # A scrape has ten seconds.

log = logging.getLogger("shoal.exporter")


@dataclass(frozen=True, slots=True)
class Reading:
    """What one look at Redis found.

    Attributes:
        waiting_requests: by queue.
        server: None where this user may not ask.
        took_s: how long the look took.
    """

    queues: tuple[QueueState, ...]
    waiting_requests: Mapping[str, int]
    workers: tuple[WorkerState, ...]
    runs: tuple[RunState, ...] = ()
    server: ServerState | None = None
    took_s: float = 0.0


class QueueCollector(Collector):
    """Reads Redis at each scrape; gives what it found, or that nothing answered.

    Safe to use from several threads; `close` it at the end.

    Args:
        url: of the Redis; it may be away, now or later.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._client: redis.Redis | None = None
        self._lock = Lock()
        self._last_success_s = 0.0
        self._trouble: str | None = None

    def collect(self) -> Iterable[Metric]:
        """All families, as of now."""
        with self._lock:
            reading = self._look()
            return list(families(reading, self._last_success_s))

    def describe(self) -> Iterable[Metric]:
        """The names alone, without a look at Redis, by which a registry finds collisions."""
        return [Metric(name, "", "gauge") for name in NAMES]

    def trouble(self) -> str | None:
        """None if Redis answers now, else what is wrong."""
        with self._lock:
            return None if self._look() is not None else self._trouble

    def close(self) -> None:
        """Close the connections."""
        if self._client is not None:
            self._client.close()
            self._client = None

    def _look(self) -> Reading | None:
        try:
            with redis_errors(self._url):
                if self._client is None:
                    self._client = connect(self._url, socket_timeout_s=READ_TIMEOUT_S, retries=0)
                reading = read(self._client)
        except (ShoalError, redis.RedisError) as error:
            # The edge of a scrape: it must say that Redis is away, and not fail.
            if self._trouble is None:
                log.error("the queues cannot be read: %s", error)
            self._trouble = str(error)
            self.close()
            return None
        if self._trouble is not None:
            log.warning("the queues can be read again")
        self._trouble = None
        self._last_success_s = time.time()
        return reading


def read(client: redis.Redis) -> Reading:
    """One look: a fixed number of round trips, whatever waits."""
    started_s = time.monotonic()
    queues, workers, now_s = read_queues_and_workers(client)
    waiting = read_waiting_requests(client, {queue.name: queue.depth for queue in queues})
    runs = read_runs(client)[-MAX_RUNS:]
    try:
        server = read_server_state(client, now_s)
    except redis.exceptions.NoPermissionError:
        server = None
    took_s = time.monotonic() - started_s
    return Reading(queues, waiting, workers, tuple(runs), server, took_s)


def families(reading: Reading | None, last_success_s: float) -> Iterator[Metric]:
    """A reading as Prometheus has it; without one, only that there is none.

    A value of before would look like a queue that stands still, so there is none.
    """
    yield _gauge("redis_up", "Whether Redis answered this scrape, 1 or 0.", reading is not None)
    yield _gauge(
        "exporter_last_success_timestamp_seconds",
        "Unix time at which the queues were last read; 0 before the first time.",
        last_success_s,
    )
    if reading is None:
        return
    yield _gauge("exporter_read_seconds", "Seconds that this look took.", reading.took_s)
    yield from _queue_families(reading)
    yield _worker_family(reading.workers)
    yield from _run_families(reading.runs)
    if reading.server is not None:
        yield from _server_families(reading.server)


def _queue_families(reading: Reading) -> Iterator[Metric]:
    depth = _labelled("queue_depth", "Jobs waiting in a queue, without those claimed.", "queue")
    requests = _labelled(
        "queue_requests",
        "Requests in the waiting jobs; estimated from both ends of a queue over 512 jobs.",
        "queue",
    )
    age = _labelled(
        "queue_oldest_age_seconds",
        "Seconds since the job that is next was enqueued; 0 for an empty queue.",
        "queue",
    )
    dead = _labelled(
        "dead_letter_jobs", "Failed jobs that RQ keeps, to be looked at or run again.", "queue"
    )
    for queue in reading.queues:
        depth.add_metric([queue.name], queue.depth)
        requests.add_metric([queue.name], reading.waiting_requests[queue.name])
        age.add_metric([queue.name], queue.oldest_age_s or 0.0)
        dead.add_metric([queue.name], queue.registries["failed"])
    yield from (depth, requests, age, dead)


def _worker_family(workers: Iterable[WorkerState]) -> Metric:
    family = _labelled(
        "workers", "Registered workers; gone: without a sign of life for 30 s.", "state"
    )
    counts = Counter(dict.fromkeys(WORKER_STATES, 0))
    counts.update(_state(worker) for worker in workers)
    for state, number in counts.items():
        family.add_metric([state], number)
    return family


def _state(worker: WorkerState) -> str:
    is_ours = worker.model is not None  # Others beat less often.
    if is_ours and worker.heartbeat_age_s is not None and worker.heartbeat_age_s > GONE_S:
        return "gone"
    return "starting" if worker.state == "started" else worker.state


def _run_families(runs: Iterable[RunState]) -> Iterator[Metric]:
    rows = GaugeMetricFamily(
        f"{PREFIX}bulk_run_rows",
        "Input rows of a bulk run by what became of them.",
        labels=("run", "output", "state"),
    )
    eta = GaugeMetricFamily(
        f"{PREFIX}bulk_run_eta_seconds",
        "Seconds until a bulk run ends at its own pace; absent until it has one and at its end.",
        labels=("run", "output"),
    )
    for run in runs:
        numbers = (
            run.rows_done - run.rows_failed,
            run.rows_failed,
            run.rows_total - run.rows_done,
        )
        for state, number in zip(RUN_ROWS, numbers, strict=True):
            rows.add_metric([run.run_id, run.output, state], number)
        if run.eta_s is not None and run.status == "running" and not run.is_stale:
            eta.add_metric([run.run_id, run.output], run.eta_s)
    yield from (rows, eta)


def _server_families(server: ServerState) -> Iterator[Metric]:
    yield _gauge("redis_memory_used_bytes", "Bytes that Redis uses.", server.used_memory_bytes)
    yield _gauge(
        "redis_memory_max_bytes",
        "Bytes that Redis may use (maxmemory); 0 without a limit.",
        server.max_memory_bytes,
    )
    yield _gauge(
        "redis_aof_enabled",
        "Whether Redis writes an append-only file, 1 or 0; without one a crash loses jobs.",
        server.aof_enabled,
    )
    yield _gauge(
        "redis_aof_ok",
        "Whether the append-only file's last write and rewrite succeeded, 1 or 0.",
        server.aof_ok,
    )
    yield _gauge(
        "redis_snapshot_ok", "Whether the last snapshot succeeded, 1 or 0.", server.snapshot_ok
    )
    yield _gauge(
        "redis_start_time_seconds", "Unix time at which Redis started.", round(server.started_s)
    )
    yield _gauge("redis_connected_clients", "Clients of Redis.", server.connected_clients)
    yield CounterMetricFamily(
        f"{PREFIX}redis_evicted_keys",
        "Keys that Redis dropped for want of memory; any is a loss.",
        value=server.evicted_keys,
    )


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(PREFIX + name, text, value=value)


def _labelled(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=(label,))


_NOTHING = Reading((), {}, (), (), server_state({}, 0.0))
NAMES = tuple(family.name for family in families(_NOTHING, 0.0))
