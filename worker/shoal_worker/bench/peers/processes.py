"""The parent's end of a peer: finds an interpreter that has it, starts it, asks it.

Owns the child processes. What they run is `adapters`'; it reaches an interpreter of its own through
a folder with nothing but a link to this package, so that none of our packages come along.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import Any, Self

import shoal_worker
from shoal.errors import InvalidRequest, ShoalError
from shoal_worker.bench.peers.protocol import Setup
from shoal_worker.bench.runs import Run
from shoal_worker.bench.workloads import Workload

_CHILD = "shoal_worker.bench.peers.child"
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
_STOP_S = 10.0


class PeerFailed(ShoalError):
    """A peer ended, or did not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is installed: an interpreter, and the peer's version there."""

    python: str
    version: str


@contextmanager
def bare_package() -> Iterator[Path]:
    """A folder for PYTHONPATH that holds this package alone."""
    with TemporaryDirectory(prefix="shoal-") as folder:
        package = Path(shoal_worker.__file__).parent
        (Path(folder) / package.name).symlink_to(package, target_is_directory=True)
        yield Path(folder)


def places(pythons: Iterable[str], package: Path) -> dict[str, Place]:
    """Which peers there are, each in the first interpreter that has it, by name.

    Raises:
        InvalidRequest: an interpreter cannot be run.
    """
    found: dict[str, Place] = {}
    for python in pythons:
        for name, version in _asked(python, package).items():
            found.setdefault(name, Place(python, version))
    return found


def _asked(python: str, package: Path) -> dict[str, str]:
    """The peers that an interpreter has, with their versions."""
    try:
        done = subprocess.run(
            [python, "-m", _CHILD],
            env=_environ(python, package),
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError as error:
        raise InvalidRequest(f"{python} cannot be run: {error.strerror}") from None
    if done.returncode:
        raise InvalidRequest(f"{python} is no Python that runs peers: {_last_line(done.stderr)}")
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


class PeerProcess:
    """A peer with its model loaded. A context manager.

    Args:
        place: its interpreter.
        package: what `bare_package` gave.

    Attributes:
        differs: as the peer tells it.
        load_s: that its loading took.
    """

    def __init__(self, name: str, place: Place, setup: Setup, package: Path) -> None:
        environ = _environ(place.python, package)
        environ |= dict.fromkeys(_THREAD_VARIABLES, str(setup.threads))
        self._log = TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed by close
        self._process = subprocess.Popen(
            [place.python, "-m", _CHILD, name, json.dumps(asdict(setup))],
            env=environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            # Ctrl-C reaches the command, which then ends it.
            start_new_session=True,
        )
        try:
            ready = self._answer()
        except BaseException:
            self.close()
            raise
        self.differs: str = ready["differs"]
        self.load_s: float = ready["load_s"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def run(self, workload: Workload) -> Run:
        """Its own time for the whole workload.

        Raises:
            PeerFailed: it ended, or made more or fewer tokens than it was asked for.
        """
        assert self._process.stdin is not None
        wanted = [one.new for one in workload.lengths]
        asked = {"prompts": [one.prompt for one in workload.requests], "new_tokens": wanted}
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        answer = self._answer()
        for made, asked_for in zip(answer["made"], wanted, strict=True):
            if made != asked_for:
                raise PeerFailed(f"made {made} tokens for a prompt that asked for {asked_for}")
        return Run(workload.new_tokens, answer["duration_s"])

    def close(self) -> None:
        """End it: by the end of its input, else at once."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(_STOP_S)
        except (subprocess.TimeoutExpired, BrokenPipeError):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failure(self) -> PeerFailed:
        code = self._process.wait()
        self._log.seek(0)
        return PeerFailed(f"ended with exit code {code}: {_last_line(self._log.read())}")


def _environ(python: str, package: Path) -> dict[str, str]:
    """Our own interpreter keeps its path; another one gets the package alone."""
    ours = os.environ.get("PYTHONPATH", "") if python == sys.executable else ""
    path = os.pathsep.join(filter(None, (str(package), ours)))
    # Hub clients would look for newer files, and some engines count their users.
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "DO_NOT_TRACK": "1"}
    return os.environ | quiet | {"PYTHONPATH": path}


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason")
