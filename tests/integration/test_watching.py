"""A real Prometheus on real workers and the exporter, under a load in which everything goes wrong.

The workers are whole but for their engine, which makes letters in the real serving loop. What the
dashboards ask must have been answered, and what they show must have moved.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
from ops.grafana.queries import ask, filled_in, panel_queries
from ops.stack import PROMETHEUS, Server, prometheus, server
from rq import Queue
from rq.serializers import JSONSerializer
from tests.conftest import wait_until
from tests.faults.server import RedisServer, require_server

from shoal import Client

SCRAPE_S = 0.5
RATE_INTERVAL = "5s"
ROOT = Path(__file__).resolve().parents[2]
SHOAL = ("-c", "from shoal.cli import main; main()")
# Metrics that this load cannot move: a run ends well, and this Redis loses nothing.
STAY_AT_0 = {"shoal_redis_evicted_keys_total"}


class Watched:
    """What runs, and how its Prometheus is asked."""

    def __init__(self, url: str, started_s: float) -> None:
        self.url = url
        self.started_s = started_s

    def values(self, expr: str) -> list[float]:
        """All finite numbers that an expression has had so far, whatever its series."""
        series = ask(
            self.url,
            filled_in(expr, RATE_INTERVAL),
            start_s=self.started_s,
            end_s=time.time(),
            step_s=SCRAPE_S,
        )
        return [value for one in series for value in one.values]

    def has_moved(self, metric: str) -> bool:
        """Whether a metric has been anything but 0."""
        return any(self.values(f'max({{__name__=~"{metric}(_count)?"}})'))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    require_server()
    if shutil.which("prometheus") is None:
        assert os.environ.get("CI") != "true", "CI must have prometheus (Debian: prometheus)"
        pytest.skip("prometheus is not installed (Debian: prometheus)")
    folder = tmp_path_factory.mktemp("watched")
    with ExitStack() as stack:
        there = RedisServer("--appendonly", "yes", "--maxmemory", "200mb")
        url = stack.enter_context(there).url
        steady, doomed, leaving = (
            stack.enter_context(_worker(url, folder, name, *options))
            for name, options in (
                ("steady", ("--lease", "1")),
                ("doomed", ("--lease", "1", "--queues", "doomed")),
                ("leaving", ("--drain-timeout", "0", "--queues", "leaving")),
            )
        )
        exporter = stack.enter_context(
            server(
                *(*SHOAL, "exporter", "--redis", url, "--metrics-port", "0"),
                log=folder / "exporter.log",
            )
        )
        targets = {
            "shoal-worker": [steady.target, doomed.target, leaving.target],
            "shoal-exporter": [exporter.target],
        }
        address = stack.enter_context(prometheus(folder, targets, interval_s=SCRAPE_S))
        watched = Watched(address, time.time())
        wait_until(lambda: len(watched.values("shoal_worker_info")) >= 3, "all are scraped")
        client = stack.enter_context(Client(url))
        _everything_goes_wrong(watched, client, there, doomed, leaving, folder)
        yield watched


def _worker(url: str, folder: Path, name: str, *options: str) -> Any:
    queues = () if "--queues" in options else ("--queues", "shoal-high,shoal-default,shoal-bulk")
    return server(
        *("-m", "tests.watched_worker", "--redis", url, "--metrics-port", "0"),
        *(*options, *queues),
        log=folder / f"{name}.log",
        PYTHONPATH=os.pathsep.join(sys.path),
    )


def _everything_goes_wrong(
    watched: Watched,
    client: Client,
    there: RedisServer,
    doomed: Server,
    leaving: Server,
    folder: Path,
) -> None:
    with _bulk_run(there.url, folder) as run:
        try:
            _faults(watched, client, there, doomed, leaving)
            assert run.wait(60) in (0, 3), "the bulk run ends"
            _redis_goes_away(watched, there)
        finally:
            run.kill()


def _faults(
    watched: Watched, client: Client, there: RedisServer, doomed: Server, leaving: Server
) -> None:
    _requests_that_fail(client)
    _jobs_that_change_hands(client, doomed, leaving)
    client.submit_many([f"M{i}" for i in range(4)], requests_per_job=4)
    _a_foreign_job(there)
    with there.client() as redis_client:
        delete = partial(_delete_a_job, client, redis_client)
        _keep_trying(watched, "shoal_commits_fenced_total", delete)


def _bulk_run(url: str, folder: Path) -> subprocess.Popen[bytes]:
    (folder / "in.txt").write_text("".join(f"row {i}\n" for i in range(160)))
    command = [*(sys.executable, *SHOAL, "bulk", str(folder / "in.txt")), "--max-tokens", "16"]
    options = ["-o", str(folder / "out.jsonl"), "--redis", url]
    return subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)


def _requests_that_fail(client: Client) -> None:
    for i in range(20):
        client.submit(f"hello {i}", max_tokens=10 + i, queue="shoal-high")
    client.submit("long " * 20, max_tokens=10)
    client.submit("hello", model="another")
    client.submit([0x110000], max_tokens=1)
    client.submit("hello", deadline=0.001)
    client.submit("hello", n=2, max_tokens=5)


def _jobs_that_change_hands(client: Client, doomed: Server, leaving: Server) -> None:
    """One worker is killed with jobs in hand, another told to leave at once."""
    for queue, one, number in (
        ("doomed", doomed, signal.SIGKILL),
        ("leaving", leaving, signal.SIGTERM),
    ):
        job = client.submit("hold", max_tokens=50, queue=queue)
        wait_until(lambda job=job: job.status == "started", f"the job of {queue} runs")
        one.process.send_signal(number)


def _a_foreign_job(there: RedisServer) -> None:
    """Its function is not ours: a dead letter."""
    with there.client() as connection:
        queue = Queue("shoal-default", connection=connection, serializer=JSONSerializer)
        queue.enqueue("os.getcwd")


def _keep_trying(watched: Watched, metric: str, what: Callable[[], None]) -> None:
    def has_moved() -> bool:
        what()
        time.sleep(SCRAPE_S)
        return watched.has_moved(metric)

    wait_until(has_moved, f"{metric} moves", timeout_s=60)


def _delete_a_job(client: Client, redis_client: redis.Redis) -> None:
    """Just before its end, so that the worker finds out when it commits."""
    job = client.submit("short", max_tokens=4, queue="shoal-high")
    wait_until(lambda: job.status in ("started", "finished"), "the job runs")
    redis_client.delete(f"rq:job:{job.id}")


def _redis_goes_away(watched: Watched, there: RedisServer) -> None:
    there.kill()
    wait_until(lambda: watched.has_moved("shoal_redis_errors_total"), "workers count errors")
    wait_until(lambda: 0 in watched.values("shoal_redis_up"), "the exporter says so")
    there.start()


@pytest.mark.server
def test_every_expression_of_every_panel_has_data(watched: Watched) -> None:
    def missing() -> list[str]:
        return [str(query) for query in panel_queries() if not watched.values(query.expr)]

    wait_until(lambda: not missing(), "all have data", timeout_s=30)


@pytest.mark.server
def test_every_metric_that_a_panel_shows_has_moved(watched: Watched) -> None:
    shown = {
        re.sub("_(bucket|sum|count)$", "", name)
        for query in panel_queries()
        for name in re.findall(r"\bshoal_[a-z0-9_]+", query.expr)
    }

    def still() -> list[str]:
        return [name for name in sorted(shown - STAY_AT_0) if not watched.has_moved(name)]

    wait_until(lambda: not still(), "all have moved", timeout_s=30)


@pytest.mark.server
def test_what_was_done_to_the_workers_is_what_they_counted(watched: Watched) -> None:
    for code in ("prompt_too_long", "model_mismatch", "invalid_request", "expired"):
        counted = watched.values(f'sum(shoal_requests_failed_total{{code="{code}"}})')
        assert max(counted) == 1, code
    splits = max(watched.values("sum(shoal_oom_splits_total)"))
    assert 1 <= splits <= max(watched.values("sum(shoal_engine_deaths_total)"))
    assert max(watched.values("shoal_dead_letter_jobs")) == 1
    assert max(watched.values('sum(shoal_jobs_retried_total{queue="leaving"})')) == 1


@pytest.mark.server
def test_vllm_s_names_say_what_ours_say(watched: Watched) -> None:
    for theirs, ours in (
        ("vllm:generation_tokens_total", "sum without (lane) (shoal_generation_tokens_total)"),
        ("vllm:time_to_first_token_seconds_count", "shoal_time_to_first_token_seconds_count"),
        ("vllm:num_requests_running", "shoal_requests_running"),
    ):
        wait_until(lambda theirs=theirs: watched.values(theirs), f"{theirs} is recorded")
        assert max(watched.values(f"sum({theirs})")) <= max(watched.values(f"sum({ours})"))


@pytest.mark.server
def test_promtool_accepts_configuration_and_rules() -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert os.environ.get("CI") != "true", "CI must have promtool (Debian: prometheus)"
        pytest.skip("promtool is not installed (Debian: prometheus)")

    checked = [
        subprocess.run([promtool, *arguments], cwd=PROMETHEUS, capture_output=True, check=False)
        for arguments in (
            ("check", "config", "prometheus.yml"),
            ("check", "rules", "--lint=all", "recording.yml"),
        )
    ]

    assert [one.returncode for one in checked] == [0, 0], checked
