"""Where a run's lines go, by the output's name; and lines appended to a file, plain or compressed.

Owns what an output is: lines in order, durable once `sync` returns, found again after a crash up to
the last that is whole. Parquet's is in `shards`.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from shoal.bulk.append_file import AppendFile
from shoal.bulk.zstd_frames import codec, frames
from shoal.errors import InvalidRequest

OutputFormat = Literal["jsonl", "jsonl.zst", "parquet", "folder"]
OUTPUTS = "outputs are .jsonl, .jsonl.zst and .parquet files, or a folder"


@dataclass(frozen=True, slots=True)
class Extent:
    """How much of an output is to be kept: so many lines, so many bytes of them uncompressed."""

    num_lines: int = 0
    num_bytes: int = 0


class Output(Protocol):
    """A run's output. `stored`, then `open`, then the rest."""

    def stored(self) -> Iterator[bytes]:
        """The whole lines that an earlier run has left, in order. Changes nothing."""
        ...

    def open(self, kept: Extent) -> None:
        """Keep this much of what is stored, and cut off what follows."""
        ...

    def append(self, lines: Sequence[bytes]) -> None:
        """Take lines; they are durable after the next `sync`."""
        ...

    @property
    def num_pending_bytes(self) -> int:
        """How much waits for `sync`."""
        ...

    def sync(self) -> None:
        """Make every line durable.

        Raises:
            OSError: there is no room; nothing is lost, and it can be tried again.
        """
        ...

    def finish(self) -> None:
        """All lines are here: make the output what it is to be. Can be tried again as `sync`."""
        ...

    def close(self) -> None:
        """Let go of the files."""
        ...

    def size(self) -> int:
        """Bytes that the output has on disk, 0 if it is not there."""
        ...

    def sha256(self) -> str | None:
        """The digest of the file or files; None where there is nothing yet."""
        ...


def output_format(path: Path) -> OutputFormat:
    """What an output's name says it is.

    Raises:
        InvalidRequest: nothing that could be written.
    """
    if path.name.endswith(".jsonl.zst"):
        return "jsonl.zst"
    if path.suffix == ".jsonl":
        return "jsonl"
    if path.suffix == ".parquet":
        return "parquet"
    if not path.suffix or path.is_dir():
        return "folder"
    raise InvalidRequest(f"{path} ends in {path.suffix!r}; {OUTPUTS}")


class JsonLines:
    """A `.jsonl` file. `sync` appends to it."""

    def __init__(self, path: Path) -> None:
        self._file = AppendFile(path)

    def stored(self) -> Iterator[bytes]:
        """The whole lines, up to the first that is torn."""
        if not self._file.path.exists():
            return
        with self._file.path.open("rb") as file:
            yield from whole_lines(file)

    def open(self, kept: Extent) -> None:
        """Cut the file after its last whole row."""
        self._file.open(kept.num_bytes)

    def append(self, lines: Sequence[bytes]) -> None:
        """Take lines."""
        for line in lines:
            self._file.append(line)

    @property
    def num_pending_bytes(self) -> int:
        """How much waits for `sync`."""
        return self._file.num_pending_bytes

    def sync(self) -> None:
        """Append what waits."""
        self._file.sync()

    def finish(self) -> None:
        """The file is what it is to be."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def size(self) -> int:
        """Bytes of the file."""
        return size_of(self._file.path)

    def sha256(self) -> str | None:
        """The file's digest."""
        return sha256_of(self._file.path)


class ZstdLines:
    """A `.jsonl.zst` file. Each `sync` appends one frame of whole lines."""

    def __init__(self, path: Path) -> None:
        self._file = AppendFile(path)
        self._lines: list[bytes] = []
        self._num_bytes = 0

    def stored(self) -> Iterator[bytes]:
        """The lines of all whole frames."""
        if not self._file.path.exists():
            return
        with self._file.path.open("rb") as file:
            for frame in frames(file):
                yield from whole_lines(frame.content.splitlines(keepends=True))

    def open(self, kept: Extent) -> None:
        """Cut the file after its last whole frame; what is kept of the next is written anew."""
        end, left = 0, kept.num_bytes
        if left and self._file.path.exists():
            with self._file.path.open("rb") as file:
                for frame in frames(file):
                    if len(frame.content) > left:
                        self.append([frame.content[:left]])
                        break
                    end, left = frame.end, left - len(frame.content)
                    if not left:
                        break
        self._file.open(end)

    def append(self, lines: Sequence[bytes]) -> None:
        """Take lines."""
        self._lines += lines
        self._num_bytes += sum(map(len, lines))

    @property
    def num_pending_bytes(self) -> int:
        """How much waits for `sync`, uncompressed."""
        return self._num_bytes

    def sync(self) -> None:
        """Append what waits as a frame."""
        if self._lines:
            self._file.append(codec().compress(b"".join(self._lines), asbytes=True))
            self._lines.clear()
            self._num_bytes = 0
        self._file.sync()

    def finish(self) -> None:
        """The file is what it is to be."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def size(self) -> int:
        """Bytes of the file."""
        return size_of(self._file.path)

    def sha256(self) -> str | None:
        """The file's digest."""
        return sha256_of(self._file.path)


def whole_lines(lines: Iterable[bytes]) -> Iterator[bytes]:
    """JSON objects a line, up to the first line that is torn; so is whatever comes after."""
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            return
        if not line.endswith(b"\n") or not isinstance(record, dict):
            return
        yield line


def size_of(path: Path) -> int:
    """Bytes of a file; 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def sha256_of(path: Path) -> str | None:
    """A file's digest; None if there is none."""
    if not path.exists():
        return None
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_durably(beside: Path, path: Path) -> None:
    """Put a finished file in its place; after a crash it is there whole, or still beside it."""
    fd = os.open(beside, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
    beside.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and new files in a folder durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
