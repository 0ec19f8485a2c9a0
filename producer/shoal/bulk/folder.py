"""The folder beside an output, `.OUTPUT.shoal`: where a run keeps what is no data.

It stands apart, and its name begins with a dot, so that no loader of data sets reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from shoal.bulk.output import output_format
from shoal.errors import InvalidRequest, ShoalError


class OutputLocked(ShoalError):
    """Another run writes this output."""


class RunFolder:
    """The paths of one run. Nothing is made before `locked`.

    Attributes:
        output: the file or folder of completions.
        shards: where Parquet is made, until it is whole.
    """

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.parent / f".{output.name}.shoal"
        self.manifest = self.path / "manifest.json"
        self.errors = self.path / "errors.jsonl"
        self.shards = self.path / "shards"

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Make the folder and hold its lock, which the kernel drops if the run is killed.

        Raises:
            OutputLocked: another run holds it. InvalidRequest: the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(exist_ok=True)
                lock = stack.enter_context((self.path / "lock").open("a+"))
            except OSError as error:
                raise InvalidRequest(
                    f"cannot write beside {self.output}: {error.strerror}"
                ) from None
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                lock.seek(0)
                pid = lock.read(20).strip() or "unknown"
                raise OutputLocked(
                    f"{self.output} is being written by another run (process {pid})"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def check_output(output: Path, source: Path) -> None:
    """Raises InvalidRequest if no run can write this output from this input."""
    is_folder = output_format(output) == "folder"
    if output.is_dir() != is_folder and output.exists():
        kind = "a folder" if output.is_dir() else "no folder"
        raise InvalidRequest(f"{output} is {kind} already; name another output")
    if not output.parent.is_dir():
        raise InvalidRequest(f"there is no folder {output.parent} to write {output.name} in")
    target = output if output.exists() else output.parent
    if not os.access(target, os.W_OK):
        raise InvalidRequest(f"{target} cannot be written: permission denied")
    if is_folder and output.exists() and output.stat().st_dev != output.parent.stat().st_dev:
        raise InvalidRequest(
            f"{output} is another file system than {output.parent}, where its run is kept: name a "
            f"folder in it, such as {output / 'corpus'}"
        )
    if source.resolve() == output.resolve():
        raise InvalidRequest(f"{output} is both input and output")
    if source.resolve().parent == RunFolder(output).path.resolve():
        raise InvalidRequest(
            f"{source} is kept by the run of {output}, which would replace it: name another output"
        )
