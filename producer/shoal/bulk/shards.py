"""Lines as Parquet shards, durable by the line: a journal becomes a shard when it is full.

Owns the shards of a run and the journal of the one being written, in the folder beside the output.
A shard is written under a temporary name and renamed. Journals are numbered as the shard that they
become, so one that has become a shard is known.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from shoal.bulk.append_file import AppendFile
from shoal.bulk.output import replace_durably, size_of, whole_lines
from shoal.bulk.parquet_files import Schema, num_rows, parquet_lines, write_parquet

ROWS_PER_SHARD = 100_000


class Shards:
    """Lines as shards of so many rows.

    Args:
        folder: where shards and journal are kept until the end.
        placed: where a shard is in the end, once it was moved there; None if it was not.
    """

    def __init__(
        self,
        folder: Path,
        schema: Schema,
        rows_per_shard: int,
        placed: Callable[[int], Path | None] = lambda _number: None,
    ) -> None:
        self.folder = folder
        self.schema = schema
        self.num_pending_bytes = 0
        self._rows_per_shard = rows_per_shard
        self._placed = placed
        self._journal: AppendFile | None = None
        self._journal_rows = 0
        self._number = 0  # Of the shard that the journal becomes.
        self._waiting: list[bytes] = []

    def path(self, number: int) -> Path:
        """A shard, wherever it is now."""
        return self._placed(number) or self.folder / f"{number:05d}.parquet"

    @property
    def paths(self) -> list[Path]:
        """All shards that there are, in order."""
        paths: list[Path] = []
        while (path := self.path(len(paths))).exists():
            paths.append(path)
        return paths

    def stored(self) -> Iterator[bytes]:
        """The lines of all shards and of the journal behind them."""
        paths = self.paths
        for path in paths:
            yield from parquet_lines(path)
        self._number = len(paths)
        if self._journal_path.exists():
            with self._journal_path.open("rb") as file:
                yield from whole_lines(file)

    def open(self, num_lines: int) -> None:
        """Keep this many lines: whole shards, and the beginning of a journal."""
        self.folder.mkdir(parents=True, exist_ok=True)
        paths, left = self.paths, num_lines
        self._number = 0
        while self._number < len(paths) and left >= (rows := num_rows(paths[self._number])):
            left, self._number = left - rows, self._number + 1
        if self._number < len(paths) and left:
            # A shard that is cut becomes a journal again, before it goes itself.
            beside = self.folder / "cut.tmp"
            with beside.open("wb") as file:
                file.writelines(islice(parquet_lines(paths[self._number]), left))
            replace_durably(beside, self._journal_path)
        for path in paths[self._number :]:
            path.unlink()
        for path in self.folder.iterdir():
            if path.suffix != ".parquet" and path != self._journal_path:
                path.unlink()
        self._open_journal(left)

    def append(self, lines: Sequence[bytes]) -> None:
        """Take lines."""
        self._waiting += lines
        self.num_pending_bytes += sum(map(len, lines))

    def sync(self) -> None:
        """Make every line durable, in a shard or in the journal."""
        is_full = True
        while is_full:
            journal = self._journal or self._open_journal(0)
            room = self._rows_per_shard - self._journal_rows
            taken, self._waiting = self._waiting[:room], self._waiting[room:]
            for line in taken:
                journal.append(line)
            self._journal_rows += len(taken)
            journal.sync()
            self.num_pending_bytes = sum(map(len, self._waiting))
            is_full = self._journal_rows == self._rows_per_shard
            if is_full:
                self._seal(journal)

    def finish(self) -> None:
        """Make a shard of what is left; there is at least one, if an empty one."""
        self.sync()
        if self._journal_rows or not self._number:
            self._seal(self._journal or self._open_journal(0))

    def close(self) -> None:
        """Let go of the journal."""
        if self._journal is not None:
            self._journal.close()

    def clear(self) -> None:
        """Remove everything that is left here: the shards were put together or moved."""
        self.close()
        for path in self.folder.iterdir():
            path.unlink()
        self.folder.rmdir()

    def size(self) -> int:
        """Bytes of everything that is here."""
        return sum(map(size_of, self.folder.iterdir())) if self.folder.exists() else 0

    @property
    def _journal_path(self) -> Path:
        return self.folder / f"{self._number:05d}.rows.jsonl"

    def _open_journal(self, num_lines: int) -> AppendFile:
        """The journal of the next shard, with this many of its lines."""
        journal, num_bytes = AppendFile(self._journal_path), 0
        if num_lines:
            with journal.path.open("rb") as file:
                num_bytes = sum(map(len, islice(file, num_lines)))
        journal.open(num_bytes)
        self._journal, self._journal_rows = journal, num_lines
        return journal

    def _seal(self, journal: AppendFile) -> None:
        """Make a shard of the journal; the next is opened when there is a line for it."""
        shard = self.folder / f"{self._number:05d}.parquet"
        beside = shard.with_name(shard.name + ".tmp")
        try:
            with journal.path.open("rb") as file:
                write_parquet(beside, self.schema, file)
            replace_durably(beside, shard)
        except OSError:
            beside.unlink(missing_ok=True)  # It is in the way where there is no room.
            raise
        journal.close()
        self._journal, self._journal_rows = None, 0
        self._number += 1
        journal.path.unlink(missing_ok=True)
