"""Everything that is watched, on this machine: `make watch`, until Ctrl-C.

A Redis, a worker with the demo model, the exporter, a Prometheus where one is installed, and a load
of interactive requests, bulk runs and a few requests that must fail. After 30 s it says which
panels of the dashboards have data.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from ops.grafana.queries import panel_queries, without_data
from ops.stack import NotStartedError, Server, prometheus, server
from rq import Queue
from rq.serializers import JSONSerializer

from shoal import Client, ShoalError
from shoal.embedded import EmbeddedRedis

PROMPTS = Path(__file__).resolve().parent / "demo" / "prompts.txt"
SCRAPE_S = 1.0
RATE_INTERVAL = "15s"
CHECKED_AFTER_S = 30.0
BULK_ROWS = 400
NO_DRAIN = ("--drain-timeout", "0")  # At the end the Redis goes too.
HARM_EVERY_S = 60.0
SHOAL = ("-c", "from shoal.cli import main; main()")


def main() -> None:
    """Start all of it, say where it is, and wait."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo", help="what the worker serves")
    parser.add_argument("--port", type=int, default=9090, help="of Prometheus; 0 takes a free one")
    parser.add_argument("--seconds", type=float, help="end by itself after so long")
    parser.add_argument("--faults", action="store_true", help="kill and cut things now and then")
    options = parser.parse_args()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="shoal-")))
        watch(stack, folder, options)


def watch(stack: ExitStack, folder: Path, options: argparse.Namespace) -> None:
    """Run until interrupted, or for so many seconds."""
    seconds: float | None = options.seconds
    print("starting Redis, a worker and the exporter ...", flush=True)
    url = stack.enter_context(EmbeddedRedis(folder)).url
    at = ("--redis", url, "--metrics-port", "0")
    worker = stack.enter_context(
        server(
            "-m",
            "shoal_worker",
            "--model",
            options.model,
            *at,
            *NO_DRAIN,
            log=folder / "worker.log",
        )
    )
    exporter = stack.enter_context(server(*SHOAL, "exporter", *at, log=folder / "exporter.log"))
    print(f"  Redis       {url}\n  worker      {worker.url}/metrics")
    print(f"  exporter    {exporter.url}/metrics", flush=True)
    targets = {"shoal-worker": [worker.target], "shoal-exporter": [exporter.target]}
    try:
        address = stack.enter_context(
            prometheus(folder, targets, interval_s=SCRAPE_S, port=options.port)
        )
    except NotStartedError as error:
        print(f"  Prometheus  none: {error}")
        address = None
    else:
        print(f"  Prometheus  {address}/graph")
        print("  Grafana     add that Prometheus as a data source, import ops/grafana/dashboards/")
    started_s = time.time()
    stack.enter_context(load(url, folder, worker if options.faults else None))
    print("a load runs; Ctrl-C stops all of it", flush=True)
    if address is not None:
        time.sleep(min(CHECKED_AFTER_S, seconds or CHECKED_AFTER_S))
        report(address, started_s)
    while seconds is None or time.time() - started_s < seconds:
        time.sleep(1)


def report(address: str, started_s: float) -> None:
    """Say which panels have no data yet."""
    missing = without_data(
        address, start_s=started_s, end_s=time.time(), rate_interval=RATE_INTERVAL
    )
    total = len(list(panel_queries()))
    print(f"{total - len(missing)} of {total} expressions of the dashboards have data", flush=True)
    for query in missing:
        print(f"  none yet: {query}", flush=True)


@contextlib.contextmanager
def load(url: str, folder: Path, faulty: Server | None) -> Iterator[None]:
    """Requests of every kind, from threads, until the block ends.

    Args:
        faulty: a worker to do harm to.
    """
    stop = threading.Event()
    prompts = PROMPTS.read_text(encoding="utf-8").splitlines()
    kinds = [
        partial(_interactive, url, prompts, "shoal-high", 2),
        partial(_interactive, url, prompts, "shoal-default", 6),
        partial(_bad, url),
        partial(_bulk_runs, url, prompts, folder),
        *([] if faulty is None else [partial(_harm, url, faulty)]),
    ]
    threads = [threading.Thread(target=kind, args=(stop,)) for kind in kinds]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def _interactive(
    url: str, prompts: list[str], queue: str, most: int, stop: threading.Event
) -> None:
    """People who wait for what they asked, think, and ask again; more of them now and then."""
    chance = random.Random(most)  # noqa: S311 - A load, no secret.
    with Client(url) as client:
        while not stop.wait(chance.uniform(0.2, 1.5)):
            jobs = [
                client.submit(prompt, queue=queue, max_tokens=chance.randint(8, 48), top_k=50)
                for prompt in chance.sample(prompts, chance.randint(1, most))
            ]
            while not (stop.wait(0.1) or all(job.done() for job in jobs)):
                pass


def _bad(url: str, stop: threading.Event) -> None:
    """What cannot be served: too long, for another model, over its deadline, cancelled."""
    with Client(url) as client:
        while not stop.wait(4.0):
            client.submit("word " * 2_000, queue="shoal-high")
            client.submit("hello", model="another", queue="shoal-high")
            client.submit("hello", deadline=0.001, queue="shoal-high")
            client.submit("hello", max_tokens=400, ignore_eos=True).cancel()


def _harm(url: str, worker: Server, stop: threading.Event) -> None:
    """Kill the worker's engine, cut its connections, send it a job that nobody can run."""
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children")
    with Client(url) as client:
        while not stop.wait(HARM_EVERY_S):
            for pid in children.read_text().split():
                os.kill(int(pid), signal.SIGKILL)
            stop.wait(HARM_EVERY_S)
            client.redis.client_kill_filter(_type="normal", skipme=True)
            queue = Queue("shoal-default", connection=client.redis, serializer=JSONSerializer)
            queue.enqueue("os.getcwd")


def _bulk_runs(url: str, prompts: list[str], folder: Path, stop: threading.Event) -> None:
    """One corpus after the other."""
    source = folder / "corpus.txt"
    source.write_text("".join(f"{one}\n" for one in prompts * (BULK_ROWS // len(prompts) + 1)))
    number = 0
    while not stop.is_set():
        number += 1
        output = folder / f"corpus-{number}.jsonl"
        with subprocess.Popen(
            [
                *(sys.executable, *SHOAL, "bulk", str(source), "-o", str(output)),
                *("--redis", url, "--max-tokens", "32", "--limit", str(BULK_ROWS)),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        ) as run:
            while run.poll() is None:
                if stop.wait(0.2):
                    run.send_signal(signal.SIGINT)
                    run.wait()
        if run.returncode not in (0, 3) and not stop.is_set():
            raise ShoalError(f"the bulk run ended with exit code {run.returncode}")


if __name__ == "__main__":
    main()
