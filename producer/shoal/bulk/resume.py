"""Which rows an earlier run has written: the input joined with the files, from the start.

Counting lines would not do: a row may have several completions or an error line, and a crash may
tear either file anywhere. So each input row is looked for where it must be, and the first one that
is not there whole is where the run goes on. Only reads.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from shoal.bulk.rows import FailedRow, InputRow

Row = InputRow | FailedRow


@dataclass(slots=True)
class Written:
    """What stays of an earlier run: whole rows, and how many bytes of each file they are.

    Attributes:
        fingerprint: of the worker that made the first completion.
    """

    rows: int = 0
    rows_failed: int = 0
    completions: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    output_bytes: int = 0
    error_bytes: int = 0
    fingerprint: str | None = None
    sha256: Any = field(default_factory=hashlib.sha256)


def join(rows: Iterable[Row], output: Path, errors: Path) -> tuple[Written, Iterator[Row]]:
    """What of these rows the files hold, and the rows that are left to do."""
    written = Written()
    iterator = iter(rows)
    completions, failures = _Records(output), _Records(errors)
    for row in iterator:
        if isinstance(row, InputRow) and (found := completions.take(_completions_key(row))):
            _count(written, found)
        elif found := failures.take([_row_key(row)]):
            written.rows_failed += 1
            written.error_bytes += sum(len(line) for line, _record in found)
        else:
            return written, chain([row], iterator)
        written.rows += 1
    return written, iter(())


def _count(written: Written, found: list[tuple[bytes, dict[str, Any]]]) -> None:
    written.fingerprint = written.fingerprint or found[0][1].get("fingerprint")
    written.prompt_tokens += found[0][1].get("prompt_tokens", 0)
    for line, record in found:
        written.completions += 1
        written.completion_tokens += record.get("completion_tokens", 0)
        written.output_bytes += len(line)
        written.sha256.update(line)


def _completions_key(row: InputRow) -> list[tuple[object, ...]]:
    num_samples = row.request.sampling.n
    return [(row.place.index, row.id, sample) for sample in range(num_samples)]


def _row_key(row: Row) -> tuple[object, ...]:
    return (row.place.index, row.id, None)


class _Records:
    """The whole JSON lines of a file, taken from the front if they are the ones expected."""

    def __init__(self, path: Path) -> None:
        self._lines = _whole_lines(path)
        self._ahead: deque[tuple[bytes, dict[str, Any]]] = deque()

    def take(self, keys: list[tuple[object, ...]]) -> list[tuple[bytes, dict[str, Any]]]:
        """The next lines, if they have these keys; else none, and they stay."""
        while len(self._ahead) < len(keys):
            following = next(self._lines, None)
            if following is None:
                return []
            self._ahead.append(following)
        for key, (_line, record) in zip(keys, self._ahead, strict=False):
            if key != (record.get("index"), record.get("id"), record.get("sample")):
                return []
        return [self._ahead.popleft() for _ in keys]


def _whole_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                return  # Torn, and so is whatever comes after.
            if not line.endswith(b"\n") or not isinstance(record, dict):
                return
            yield line, record
