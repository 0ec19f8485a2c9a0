"""Input files as rows, one at a time: memory does not grow with the file.

Owns the formats and what a line is. What a record means is in `rows`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from shoal.bulk.rows import (
    FailedRow,
    InputRow,
    Place,
    RowDefaults,
    failed_row,
    row_from_line,
    row_from_record,
)
from shoal.errors import InvalidRequest

INPUT_SUFFIXES = (".txt", ".jsonl")
# A prompt may have 1 MiB, which JSON's escapes can make six times as long; metadata has its own.
MAX_LINE_BYTES = 8 * 1024 * 1024
MAX_SHOWN_BYTES = 1024  # Of a line that is too long to be kept.
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Survey:
    """What one look through an input tells: its digest, and how many records it has."""

    sha256: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank, without its end; `too_long` if the rest of it was dropped."""

    number: int
    content: bytes
    too_long: bool = False


def check_input(path: Path) -> None:
    """Raises InvalidRequest if this is no input that a run could read."""
    if str(path) == "-":
        raise InvalidRequest("standard input is not read yet: give a .txt or .jsonl file")
    if path.suffix not in INPUT_SUFFIXES:
        raise InvalidRequest(f"{path} ends in {path.suffix!r}; inputs are .txt and .jsonl files")
    if path.is_dir():
        raise InvalidRequest(f"{path} is a folder; give a .txt or .jsonl file")
    try:
        path.open("rb").close()
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None


def survey(path: Path) -> Survey:
    """Digest and count, without parsing."""
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return Survey(sha256, sum(1 for _ in lines(file)))


def read_rows(path: Path, defaults: RowDefaults) -> Iterator[InputRow | FailedRow]:
    """The rows of a `.txt` (a prompt a line) or `.jsonl` file, in order; blank lines are none."""
    with path.open("rb") as file:
        for index, line in enumerate(lines(file)):
            yield _row(line, Place(index, line.number), defaults, is_text=path.suffix == ".txt")


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


def _row(line: Line, place: Place, defaults: RowDefaults, *, is_text: bool) -> InputRow | FailedRow:
    try:
        text = _text(line)
    except InvalidRequest as error:
        shown_bytes = line.content[:MAX_SHOWN_BYTES] if line.too_long else line.content
        shown = shown_bytes.decode(errors="backslashreplace")
        return failed_row(place, str(place.index), shown, error)
    if is_text:
        return row_from_record({"prompt": text}, place, defaults)
    return row_from_line(text, place, defaults)


def _text(line: Line) -> str:
    if line.too_long:
        raise InvalidRequest(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        return line.content.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(
            f"the line is not UTF-8: byte 0x{line.content[error.start]:02x} at {error.start}"
        ) from None
