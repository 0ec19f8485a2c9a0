"""The exporter: what it says of queues, workers and Redis, and that looking changes nothing."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import redis
from prometheus_client import CollectorRegistry, generate_latest
from tests.conftest import wait_until

from shoal.bulk.run_state import STATE_TTL_S, RunState, save_commands, state_key
from shoal.exporter import NAMES, RUN_ROWS, QueueCollector
from shoal.server_state import server_state
from shoal.waiting import MAX_LOOKED_AT, estimate, requests_of

# The exporter's stems in the public interface: a rename here breaks users' dashboards.
STEMS = {
    *("queue_depth", "queue_requests", "queue_oldest_age_seconds", "dead_letter_jobs", "workers"),
    *("bulk_run_rows", "bulk_run_eta_seconds", "exporter_last_success_timestamp_seconds"),
}
BULK = {"queue": "shoal-bulk"}


class Exporter:
    """A collector and its registry, read back by name and labels."""

    def __init__(self, url: str) -> None:
        self.registry = CollectorRegistry()
        self.collector = QueueCollector(url)
        self.registry.register(self.collector)

    def values(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name.removeprefix("shoal_"), frozenset(sample.labels.items())): sample.value
            for family in self.registry.collect()
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float | None:
        return self.values().get((name, frozenset(labels.items())))


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(redis_url) as client:
        yield client


@pytest.fixture
def exporter(redis_url: str) -> Iterator[Exporter]:
    exporter = Exporter(redis_url)
    yield exporter
    exporter.collector.close()


def enqueue(
    client: redis.Redis, number: int, *, meta: object = None, age_s: float = 0.0, prefix: str = "j"
) -> None:
    """So many waiting jobs, as far as the exporter looks at them."""
    enqueued = (datetime.now(UTC) - timedelta(seconds=age_s)).isoformat()
    with client.pipeline(transaction=False) as pipeline:
        for i in range(number):
            fields: dict[Any, Any] = {"enqueued_at": enqueued, "meta": json.dumps(meta)}
            pipeline.hset(f"rq:job:{prefix}{i}", mapping=fields)
            pipeline.rpush("rq:queue:shoal-bulk", f"{prefix}{i}")
        pipeline.execute()


def test_the_names_are_those_of_the_public_interface(exporter: Exporter) -> None:
    assert {f"shoal_{stem}" for stem in STEMS} <= set(NAMES)


def test_shoal_s_queues_stand_at_0_when_nothing_was_ever_sent(exporter: Exporter) -> None:
    values = exporter.values()

    for queue in ("shoal-high", "shoal-default", "shoal-bulk"):
        for stem in ("queue_depth", "queue_requests", "queue_oldest_age_seconds"):
            assert values[stem, frozenset({"queue": queue}.items())] == 0
        assert values["dead_letter_jobs", frozenset({"queue": queue}.items())] == 0
    assert exporter.value("workers", state="busy") == 0
    assert exporter.value("redis_up") == 1


def test_a_queue_has_jobs_requests_and_an_oldest(client: redis.Redis, exporter: Exporter) -> None:
    enqueue(client, 3, meta={"requests": 32}, age_s=90)
    enqueue(client, 1, meta={"requests": 4}, prefix="other")
    client.zadd("rq:failed:shoal-bulk", {"dead1": 1, "dead2": 2})

    assert exporter.value("queue_depth", **BULK) == 4
    assert exporter.value("queue_requests", **BULK) == 3 * 32 + 4
    age_s = exporter.value("queue_oldest_age_seconds", **BULK)
    assert age_s is not None
    assert 89 <= age_s < 120
    assert exporter.value("dead_letter_jobs", **BULK) == 2


def test_a_long_queue_s_requests_are_estimated_from_both_ends_with_few_reads(
    client: redis.Redis, exporter: Exporter
) -> None:
    enqueue(client, 1_500, meta={"requests": 10}, prefix="a")
    enqueue(client, 1_500, meta={"requests": 30}, prefix="b")
    client.config_resetstat()

    assert exporter.value("queue_requests", **BULK) == 3_000 * 20

    calls: Any = client.info("commandstats")
    assert calls["cmdstat_hget"]["calls"] <= 2 * MAX_LOOKED_AT + 3


@pytest.mark.parametrize(
    ("meta", "requests"),
    [
        (None, 1),
        (b'{"requests": 7}', 7),
        (b'{"requests": 0}', 1),
        (b'{"requests": 1e400}', 1),
        (b'{"requests": "many"}', 1),
        (b"[]", 1),
        (b"\x80pickle", 1),
        (b"[" * 100_000, 1),
    ],
)
def test_a_job_whose_meta_is_not_ours_is_one_request(meta: bytes | None, requests: int) -> None:
    assert requests_of(meta) == requests


def test_an_estimate_is_never_under_what_was_seen() -> None:
    assert estimate([5, 5], depth=1) == 10  # Jobs left between the two looks.
    assert estimate([], depth=3) == 3


def test_workers_are_counted_by_state_and_a_silent_one_is_gone(
    client: redis.Redis, exporter: Exporter
) -> None:
    now = datetime.now(UTC)
    for name, state, model, age_s in (
        ("a", "busy", "gpt2", 0),
        ("b", "busy", "gpt2", 300),
        ("c", "idle", "", 300),  # RQ's own beats less often.
        ("d", "started", "", 0),
    ):
        beat = (now - timedelta(seconds=age_s)).isoformat()
        fields: dict[Any, Any] = {"state": state, "last_heartbeat": beat, "queues": "shoal-bulk"}
        client.hset(f"rq:worker:{name}", mapping=fields | ({"shoal_model": model} if model else {}))
        client.sadd("rq:workers", f"rq:worker:{name}")

    found = {state: exporter.value("workers", state=state) for state in ("busy", "idle", "gone")}

    assert found == {"busy": 1, "idle": 1, "gone": 1}
    assert exporter.value("workers", state="starting") == 1


def tell_of_run(client: redis.Redis, run_id: str, status: str, age_s: float = 0.0) -> None:
    state = RunState(run_id, status, "out.jsonl", "shoal-bulk", 100, 40, 3, 1, 9.0, 9.0, eta_s=12.5)
    for command in save_commands(state, time.time()):
        client.execute_command(*command)
    client.pexpire(state_key(run_id), int(1000 * (STATE_TTL_S - age_s)))


def test_a_bulk_run_tells_its_rows_and_when_it_ends(
    client: redis.Redis, exporter: Exporter
) -> None:
    tell_of_run(client, "r1", "running")

    of_run = {"run": "r1", "output": "out.jsonl"}
    rows = {s: exporter.value("bulk_run_rows", state=s, **of_run) for s in RUN_ROWS}
    assert rows == {"done": 37, "failed": 3, "waiting": 60}
    assert exporter.value("bulk_run_eta_seconds", **of_run) == 12.5


def test_a_run_that_does_not_run_has_no_end_to_wait_for(
    client: redis.Redis, exporter: Exporter
) -> None:
    tell_of_run(client, "ended", "interrupted")
    tell_of_run(client, "killed", "running", age_s=120)

    found = [(name, dict(labels).get("run")) for name, labels in exporter.values()]

    assert found.count(("bulk_run_rows", "ended")) == len(RUN_ROWS)
    assert "bulk_run_eta_seconds" not in {name for name, _ in found}


def test_looking_reaps_nothing(client: redis.Redis, exporter: Exporter) -> None:
    client.zadd("rq:wip:shoal-bulk", {"job:execution": 1})  # Overdue since 1970.
    client.zadd("rq:finished:shoal-bulk", {"done": 1})

    exporter.values()

    assert client.zcard("rq:wip:shoal-bulk") == 1
    assert client.zcard("rq:finished:shoal-bulk") == 1


def test_a_redis_that_is_away_is_said_to_be_and_no_queue_is_made_up(tmp_path: Any) -> None:
    exporter = Exporter(f"unix://{tmp_path}/nobody.sock")

    assert exporter.values() == {
        ("redis_up", frozenset()): 0,
        ("exporter_last_success_timestamp_seconds", frozenset()): 0,
    }
    trouble = exporter.collector.trouble()
    assert trouble is not None
    assert "nobody.sock" in trouble


def test_a_redis_that_comes_back_is_read_again(redis_url: str, exporter: Exporter) -> None:
    exporter.values()
    there, exporter.collector._url = exporter.collector._url, "unix:///nobody.sock"
    exporter.collector.close()
    assert exporter.value("redis_up") == 0
    exporter.collector._url = there

    assert exporter.value("redis_up") == 1
    assert exporter.collector.trouble() is None


def test_the_server_s_memory_and_persistence_are_told(
    client: redis.Redis, exporter: Exporter
) -> None:
    used = exporter.value("redis_memory_used_bytes")

    assert used is not None
    assert used > 100_000
    assert exporter.value("redis_aof_enabled") == 0
    assert exporter.value("redis_aof_ok") == 1


@pytest.mark.parametrize(
    ("facts", "aof_ok", "snapshot_ok"),
    [
        ({}, True, True),
        ({"aof_last_write_status": "err"}, False, True),
        ({"aof_last_bgrewrite_status": "err"}, False, True),
        ({"rdb_last_bgsave_status": "err"}, True, False),
    ],
)
def test_a_failed_write_to_disk_shows(
    facts: dict[str, str], *, aof_ok: bool, snapshot_ok: bool
) -> None:
    state = server_state(facts, 0.0)

    assert (state.aof_ok, state.snapshot_ok) == (aof_ok, snapshot_ok)


def test_a_user_without_the_right_to_info_gets_the_queues_all_the_same(
    client: redis.Redis, redis_url: str
) -> None:
    client.execute_command("ACL", "SETUSER", "reader", "on", ">word", "~*", "+@all", "-info")
    exporter = Exporter(f"{redis_url}&username=reader&password=word")

    values = exporter.values()

    assert values["queue_depth", frozenset(BULK.items())] == 0
    assert ("redis_memory_used_bytes", frozenset()) not in values
    exporter.collector.close()
    client.execute_command("ACL", "DELUSER", "reader")


def test_the_command_serves_until_it_is_told_to_stop(redis_url: str) -> None:
    command = [sys.executable, "-c", "from shoal.cli import main; main()", "exporter"]
    with subprocess.Popen(
        [*command, "--redis", redis_url, "--metrics-port", "0"], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/metrics)", line)
        assert found is not None, line
        pages = {
            page: urllib.request.urlopen(f"{found[0]}/{page}").read().decode()
            for page in ("metrics", "healthz", "readyz")
        }
        process.send_signal(signal.SIGTERM)
        code = process.wait(20)

    assert line.startswith("ready: queues at ")
    assert 'shoal_queue_depth{queue="shoal-bulk"} 0.0' in pages["metrics"]
    assert "process_cpu_seconds_total" in pages["metrics"]
    assert (pages["healthz"], pages["readyz"]) == ("ok\n", "ok\n")
    assert code == 0


def test_the_exporter_loads_no_torch_and_no_worker() -> None:
    unwanted = ("torch", "transformers", "shoal_worker")
    code = f"import sys, shoal.cli.exporter; print([m for m in {unwanted} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


@pytest.mark.server
def test_promtool_accepts_the_exposition(client: redis.Redis, exporter: Exporter) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert os.environ.get("CI") != "true", "CI must have promtool (Debian: prometheus)"
        pytest.skip("promtool is not installed (Debian: prometheus)")

    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=generate_latest(exporter.registry),
        capture_output=True,
        check=False,
    )

    assert (checked.stdout + checked.stderr).decode() == ""


def test_no_name_is_declared_twice(exporter: Exporter) -> None:
    with pytest.raises(ValueError, match="shoal_queue_depth"):
        exporter.registry.register(QueueCollector("unix:///nobody.sock"))

    wait_until(lambda: exporter.value("redis_up") == 1, "the first one still answers")
