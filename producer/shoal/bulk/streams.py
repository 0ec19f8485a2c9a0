"""Bytes of an input, whatever it is compressed with, and standard input made a file.

Owns opening and the lines of what was opened; memory does not grow with either.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from shoal.errors import InvalidRequest

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
# A prompt may have 1 MiB, which JSON's escapes can make six times as long; metadata has its own.
MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_SHOWN_BYTES = 1024  # Of a line that is too long to be kept.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_CHUNK_BYTES = 1024 * 1024
_MAGICS = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank, without its end; `too_long` if the rest of it was dropped."""

    number: int
    content: bytes
    too_long: bool = False


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's content, decompressed by its suffix.

    Raises:
        InvalidRequest: it is not what its suffix says, or breaks off; also while it is read.
    """
    compression = COMPRESSIONS.get(path.suffix)
    if compression is None:
        with path.open("rb") as file:
            yield file
        return
    # Imported here: most runs have no use for it, and it takes a while.
    import pyarrow as pa  # noqa: PLC0415

    try:
        with pa.input_stream(str(path), compression=compression) as stream:
            # Its own `readline` reads a byte at a time.
            yield cast("BinaryIO", io.BufferedReader(stream, _CHUNK_BYTES))
    except OSError as error:
        if error.errno is not None:
            raise
        raise InvalidRequest(f"{path} cannot be decompressed: {error}") from None


def lines(file: BinaryIO) -> Iterator[Line]:
    """The lines of a file that are not blank, each bounded in length."""
    number = 0
    while content := file.readline(MAX_LINE_BYTES):
        number += 1
        too_long = len(content) == MAX_LINE_BYTES and not content.endswith(b"\n")
        rest = content if too_long else b"\n"
        while rest and not rest.endswith(b"\n"):
            rest = file.readline(MAX_LINE_BYTES)
        if number == 1:
            content = content.removeprefix(_BYTE_ORDER_MARK)
        if content.strip():
            yield Line(number, content.rstrip(b"\r\n"), too_long)


def text_of(line: Line) -> str:
    """A line as text.

    Raises:
        InvalidRequest: it is too long, or not UTF-8.
    """
    if line.too_long:
        raise InvalidRequest(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return line.content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the line is not UTF-8: byte 0x{line.content[error.start]:02x} at {error.start}"
        ) from None


def shown(line: Line) -> str:
    """A line that is no text, as well as it can be shown."""
    content = line.content[:MAX_SHOWN_BYTES] if line.too_long else line.content
    return content.decode(errors="backslashreplace")


def spool(folder: Path, *, is_table: bool, stream: IO[bytes] | None = None) -> Path:
    """Standard input as a file in `folder`, so that it can be digested, read again and resumed.

    Its format follows from how it begins: a magic number, or `{` for JSON lines. Its name follows
    from its content. If nothing comes and an earlier run has kept its own, that one is taken.

    Args:
        is_table: whether what is no JSON has columns (CSV) rather than a prompt a line.
    """
    kept = kept_inputs(folder)
    source: Any = stream or sys.stdin.buffer
    beside, digest = folder / "stdin.new", hashlib.sha256()
    with beside.open("wb") as file:
        start = chunk = source.read(_CHUNK_BYTES)
        while chunk:
            file.write(chunk)
            digest.update(chunk)
            chunk = source.read(_CHUNK_BYTES)
        file.flush()
        os.fsync(file.fileno())
    if not start and kept:
        beside.unlink()
        return kept[0]
    compression = next((s for magic, s in _MAGICS.items() if start.startswith(magic)), "")
    packed = beside.rename(folder / f"stdin.raw{compression}")
    with opened(packed) as content:
        first = content.read(4096).removeprefix(_BYTE_ORDER_MARK).lstrip()
    name = f"input-{digest.hexdigest()[:16]}{_suffix(first, is_table=is_table)}{compression}"
    return packed.rename(folder / name)


def kept_inputs(folder: Path) -> list[Path]:
    """What was kept of standard input, by this run or an earlier one."""
    return sorted(folder.glob("input-*"))


def _suffix(first: bytes, *, is_table: bool) -> str:
    if first.startswith(b"PAR1"):
        return ".parquet"
    if first.startswith(b"{"):
        return ".jsonl"
    return ".csv" if is_table else ".txt"
