"""The same rows whatever happens: one bulk run, made under seven sets of circumstances.

`python -m tests.faults.same_rows [--rows 2000] [--max-tokens 32] [--json]` starts a Redis of its
own (append-only, each write synced) and real workers with the demo model, or with `--model`. Where
`--devices cuda:0,cuda:1` names several, workers are spread over them. Prompts are of mixed lengths,
tokens are sampled. The exit code is 1 if any two runs differ in a byte, or if a fault never struck.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import wait_until
from tests.faults.fleet import Fleet, Producer
from tests.faults.server import RedisServer

from shoal import Client
from shoal.errors import ShoalError

WORDS = ("the", "of", "and", "return", "is", "that", "for", "module", "with", "value", "by", "this")
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")
POLL_S = 0.02
# KEYS: a queue. ARGV: a seed. Puts its jobs in another order, in one step.
SHUFFLE = """
local ids = redis.call('LRANGE', KEYS[1], 0, -1)
if #ids < 2 then return 0 end
math.randomseed(ARGV[1])
for i = #ids, 2, -1 do
  local j = math.random(i)
  ids[i], ids[j] = ids[j], ids[i]
end
redis.call('DEL', KEYS[1])
for _, id in ipairs(ids) do redis.call('RPUSH', KEYS[1], id) end
return #ids
"""


@dataclass(frozen=True, slots=True)
class Options:
    """What is run, and how often it is struck at the most.

    Attributes:
        model: as `shoal worker --model` takes it.
        devices: of the workers, as `--device` takes them, by commas.
        workers: in all runs but the first.
    """

    rows: int = 2_000
    max_tokens: int = 32
    model: str = "demo"
    devices: str = "auto"
    workers: int = 3
    lease_s: float = 2.0
    kill_s: float = 5.0
    worker_kills: int = 1_000
    producer_kills: int = 5
    redis_kills: int = 2
    seed: int = 0


@dataclass(slots=True)
class Report:
    """What came of each circumstance: the digest of its rows, how often it struck, its time."""

    rows: int
    digests: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    strikes: dict[str, int] = field(default_factory=dict)
    wall_s: dict[str, float] = field(default_factory=dict)

    def violations(self) -> list[str]:
        """All that must not be, in words."""
        found = []
        if len(set(self.digests.values())) != 1 or len(set(self.files.values())) != 1:
            found.append("the rows differ")
        found += [f"{what}: never happened" for what, times in self.strikes.items() if not times]
        return found

    def table(self) -> str:
        """For people."""
        lines = [f"{self.rows} rows"]
        for what, digest in self.digests.items():
            times = f"{self.strikes[what]} times" if what in self.strikes else ""
            lines.append(f"{what:<40} {times:>10} {self.wall_s[what]:>7.1f} s  {digest}")
        return "\n".join([*lines, *(f"! {text}" for text in self.violations())])


class Circumstances:
    """One server, its workers and the input, and the same run again and again."""

    def __init__(self, options: Options, server: RedisServer, fleet: Fleet, folder: Path) -> None:
        self.options = options
        self.report = Report(options.rows)
        self._server = server
        self._fleet = fleet
        self._folder = folder
        self._chance = random.Random(options.seed)
        self._source = folder / "in.jsonl"
        self._source.write_text("".join(map(_line, _records(options, self._chance))))

    def one_worker(self) -> None:
        """(a) One alone."""
        self._fleet.have(1)
        with self._run("1 worker"):
            pass

    def several_workers(self) -> None:
        """(b) Several, which share the rows as it comes."""
        self._fleet.have(self.options.workers)
        with self._run(f"{self.options.workers} workers"):
            pass

    def killed_workers(self) -> None:
        """(c) One of them is killed every few seconds, while it holds jobs."""
        self._fleet.have(self.options.workers)
        kills, next_s = 0, 0.0
        with self._run("a worker killed, again and again") as producer:
            while producer.is_running:
                holder = self._holder() if time.monotonic() >= next_s else None
                if holder is not None and kills < self.options.worker_kills:
                    holder.kill()
                    kills, next_s = kills + 1, time.monotonic() + self.options.kill_s
                    self._fleet.start(self.options.workers)
                time.sleep(POLL_S)
        self.report.strikes["a worker killed, again and again"] = kills

    def killed_producer(self) -> None:
        """(d) It is killed at random moments while its jobs are under way, and started again."""
        self._fleet.have(self.options.workers)
        kills = 0
        what = "the producer killed, and started again"
        output = self._folder / "killed.jsonl"
        started_s = time.monotonic()
        with self._server.client() as connection:
            while kills < self.options.producer_kills:
                producer = self._producer(output)
                _wait(lambda: bool(connection.keys("rq:shoal:bulk:*:jobs")), producer)
                if kills:  # The first time at once, so that it happens in a short run too.
                    time.sleep(self._chance.uniform(0.0, 2.0))
                if not producer.kill():
                    break
                kills += 1
        self._take(what, self._producer(output).summary(), started_s)
        self.report.strikes[what] = kills

    def killed_redis(self) -> None:
        """(e) The server is killed while jobs are under way, and reads what it had written."""
        self._fleet.have(self.options.workers)
        kills = 0
        what = "Redis killed, and started again"
        with self._run(what) as producer:
            while producer.is_running and kills < self.options.redis_kills:
                with self._server.client() as connection:
                    _wait(lambda: bool(connection.keys("rq:shoal:bulk:*:jobs")), producer)
                if producer.is_running:
                    self._server.kill()
                    self._server.start()
                    kills += 1
                    _sleep_while(producer, 2.0)
        self.report.strikes[what] = kills

    def shuffled(self) -> None:
        """(f) Jobs are put in another order before any is taken, and again and again."""
        self._fleet.have(self.options.workers)
        what, shuffles = "jobs shuffled", 0
        with self._server.client() as connection:
            connection.set("rq:suspended", 1)
            time.sleep(1.5)  # Workers look once a second whether they are suspended.
            with self._run(what) as producer:
                _wait(lambda: connection.llen("rq:queue:shoal-bulk") > 1, producer)
                while producer.is_running:
                    seed = self._chance.randrange(2**31)
                    shuffles += bool(connection.eval(SHUFFLE, 1, "rq:queue:shoal-bulk", seed))
                    connection.delete("rq:suspended")
                    time.sleep(POLL_S)
        self.report.strikes[what] = shuffles

    def in_company(self) -> None:
        """(g) Somebody else's requests, of all lengths, are decoded in the same batches."""
        self._fleet.have(self.options.workers)
        what = "another user's requests between"
        with self._run(what) as producer:
            answered = _company(self._server.url, producer, random.Random(self.options.seed + 1))
        self.report.strikes[what] = answered

    def _holder(self) -> Any:
        with self._server.client() as connection:
            for worker in self._chance.sample(self._fleet.workers, len(self._fleet.workers)):
                if connection.scard(f"rq:worker:{worker.name}:executions"):
                    return worker
        return None

    @contextlib.contextmanager
    def _run(self, what: str) -> Iterator[Producer]:
        started_s = time.monotonic()
        producer = self._producer(self._folder / f"{len(self.report.digests)}.jsonl")
        try:
            yield producer
            self._take(what, producer.summary(), started_s)
        finally:
            producer.kill()

    def _producer(self, output: Path) -> Producer:
        sampling = ["--top-k", "50", "--temperature", "0.9", "--seed", "7"]
        return Producer(self._server.url, self._source, output, sampling)

    def _take(self, what: str, summary: dict[str, Any], started_s: float) -> None:
        assert (summary["rows"], summary["failed"]) == (self.options.rows, 0), summary
        self.report.digests[what] = summary["rows_sha256"]
        self.report.files[what] = summary["file_sha256"]
        self.report.wall_s[what] = time.monotonic() - started_s
        print(f"{what}: {self.report.digests[what][:16]}", file=sys.stderr, flush=True)


def run(options: Options) -> Report:
    """All circumstances, one after the other."""
    with (
        RedisServer(*DURABLE) as server,
        tempfile.TemporaryDirectory() as folder,
        Fleet(
            server.url, Path(folder), options.lease_s, options.model, options.devices.split(",")
        ) as fleet,
    ):
        here = Circumstances(options, server, fleet, Path(folder))
        here.one_worker()
        here.several_workers()
        here.in_company()
        here.shuffled()
        here.killed_producer()
        here.killed_redis()
        here.killed_workers()
        return here.report


def _records(options: Options, chance: random.Random) -> Iterator[dict[str, Any]]:
    for index in range(options.rows):
        num_words = int(chance.triangular(1, 120, 8))
        yield {
            "prompt": " ".join(chance.choice(WORDS) for _ in range(num_words)),
            "max_tokens": chance.randint(1, options.max_tokens),
            "n": 2 if index % 50 == 0 else 1,
        }


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def _wait(condition: Callable[[], bool], producer: Producer) -> None:
    wait_until(lambda: condition() or not producer.is_running, "the run is under way", 60.0)


def _sleep_while(producer: Producer, seconds: float) -> None:
    end_s = time.monotonic() + seconds
    while producer.is_running and time.monotonic() < end_s:
        time.sleep(POLL_S)


def _company(url: str, producer: Producer, chance: random.Random) -> int:
    """Requests answered while the producer ran."""
    answered = 0
    lock = threading.Lock()

    def ask(queue: str, service_class: str, numbers: random.Random) -> None:
        nonlocal answered
        with Client(url) as client:
            while producer.is_running:
                prompt = " ".join(numbers.choice(WORDS) for _ in range(numbers.randint(1, 150)))
                with contextlib.suppress(ShoalError):
                    job = client.submit(
                        prompt, queue=queue, service_class=service_class, max_tokens=24, top_k=20
                    )
                    job.result(timeout=30)
                    with lock:
                        answered += 1

    users = [
        threading.Thread(target=ask, args=(queue, kind, random.Random(chance.random())))
        for queue, kind in (("shoal-high", "interactive"), ("shoal-default", "bulk"))
        for _ in range(3)
    ]
    for user in users:
        user.start()
    for user in users:
        user.join()
    return answered


def main() -> None:
    """Run as asked on the command line, print the report, and leave with its verdict."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in Options.__dataclass_fields__.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default.default), default=default.default)
    parser.add_argument("--json", action="store_true", help="one JSON object, not a table")
    values = vars(parser.parse_args())
    as_json = values.pop("json")
    report = run(Options(**values))
    if as_json:
        names = ("rows", "digests", "files", "strikes", "wall_s")
        print(json.dumps({name: getattr(report, name) for name in names}, indent=2))
    else:
        print(report.table())
    sys.exit(1 if report.violations() else 0)


if __name__ == "__main__":
    main()
