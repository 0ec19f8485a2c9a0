"""Each arm in a process of its own, asked over a pipe; what runs there is in `child.py`.

So an arm's peak of memory is its own, and nothing that it replaces or switches reaches another.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, Literal

from shoal.errors import ShoalError
from shoal_worker.bench.ablate.arms import Arm
from shoal_worker.bench.ablate.load import Load
from shoal_worker.bench.ablate.switch import Kind

_CHILD = "shoal_worker.bench.ablate.child"
_LEAVING_S = 3
Question = Literal["run", "peaks", "counts", "load_counts", "logits", "facts"]


@dataclass(frozen=True, slots=True)
class Spec:
    """What a process is to load.

    Attributes:
        model: a folder, a hub id or `demo`.
        tokenizer: whose tokenizer to measure.
    """

    model: str
    tokenizer: str
    device: str
    arm: Arm
    load: Load
    kind: Kind


class TrialProcess:
    """A process with one arm in it."""

    def __init__(self, connection: Connection[Any, Any]) -> None:
        self._connection = connection
        self._load_s: float | None = None

    def loaded(self) -> float:
        """Wait until it can be asked: seconds from the model's files to the first step, cold.

        Raises:
            ShoalError: it could not load the arm.
        """
        if self._load_s is None:
            self._load_s = _received(self._connection)
        return self._load_s

    def ask(self, question: Question) -> Any:
        """An answer of the trial's, see `trial` and `tokenising`.

        Raises:
            ShoalError: it failed there; the text is that error's.
        """
        self.loaded()
        self._connection.send(question)
        return _received(self._connection)


@contextmanager
def trial_process(spec: Spec) -> Iterator[TrialProcess]:
    """Start a fresh process with an arm; it ends with the context."""
    with _started("load_trial", spec) as connection:
        yield TrialProcess(connection)


def write_model(shape: str, folder: str) -> None:
    """Write a model of random weights, in a process that leaves nothing behind in this one."""
    with _started("write_model", (shape, folder)) as connection:
        _received(connection)


def surroundings(device: str) -> dict[str, Any]:
    """Hardware, device, threads and versions, as a measuring process finds them."""
    with _started("look_around", device) as connection:
        found: dict[str, Any] = _received(connection)
    return found


def _received(connection: Connection[Any, Any]) -> Any:
    try:
        has_failed, answer = connection.recv()
    except EOFError:
        raise ShoalError("a measuring process died; was it out of memory?") from None
    if has_failed:
        raise ShoalError(answer)
    return answer


@contextmanager
def _started(role: str, argument: Any) -> Iterator[Connection[Any, Any]]:
    # Forked from a server that has imported torch and done nothing with it: as fresh as a new
    # interpreter, and seconds sooner.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_CHILD])
    ours, theirs = context.Pipe()
    process = context.Process(target=_play, args=(theirs, role, argument), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        # It leaves at the end of its pipe; one that still computes does not look there.
        ours.close()
        process.join(timeout=_LEAVING_S)
        if process.is_alive():
            process.kill()
            process.join()


def _play(connection: Connection[Any, Any], role: str, argument: Any) -> None:
    # Not imported above: whoever starts processes must not load torch.
    child = import_module(_CHILD)
    with suppress(EOFError, BrokenPipeError, KeyboardInterrupt):
        child.play(connection, role, argument)
