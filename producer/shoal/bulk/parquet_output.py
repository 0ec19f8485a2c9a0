"""Parquet outputs: a single file put together at the end, or a folder of shards with a card.

Owns what becomes of a run's shards when all its rows are there, and how they are found again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from shoal.bulk.output import Extent, replace_durably, sha256_of, size_of, sync_folder
from shoal.bulk.parquet_files import Schema, join_parquet, num_rows, parquet_lines, write_parquet
from shoal.bulk.shards import Shards


class ParquetFile:
    """A single `.parquet` file, put together from shards at the end."""

    def __init__(self, path: Path, shards: Shards) -> None:
        self._path = path
        self._shards = shards
        self._num_lines = 0

    def stored(self) -> Iterator[bytes]:
        """The lines of the file, if there is one; else those of the shards."""
        # The file gets its name when it is whole, so it holds every row.
        return parquet_lines(self._path) if self._path.exists() else self._shards.stored()

    def open(self, kept: Extent) -> None:
        """Keep this many lines."""
        self._num_lines = kept.num_lines
        if not self._path.exists():
            self._shards.open(kept.num_lines)
        elif kept.num_lines < num_rows(self._path):
            self._unpack()

    def append(self, lines: Sequence[bytes]) -> None:
        """Take lines."""
        if self._path.exists():
            self._unpack()
        self._shards.append(lines)

    @property
    def num_pending_bytes(self) -> int:
        """How much waits for `sync`."""
        return self._shards.num_pending_bytes

    def sync(self) -> None:
        """Make every line durable."""
        if not self._path.exists():
            self._shards.sync()

    def finish(self) -> None:
        """Put the shards together."""
        if not self._path.exists():
            self._shards.finish()
            beside = self._shards.folder / "whole.parquet.tmp"
            join_parquet(beside, self._shards.schema, self._shards.paths)
            replace_durably(beside, self._path)
        if self._shards.folder.exists():
            self._shards.clear()

    def close(self) -> None:
        """Let go of the files."""
        self._shards.close()

    def size(self) -> int:
        """Bytes of the file, or of what it is made from."""
        return size_of(self._path) or self._shards.size()

    def sha256(self) -> str | None:
        """The file's digest."""
        return sha256_of(self._path)

    def _unpack(self) -> None:
        """Make the file's first lines a shard again, since it is to have others behind them."""
        self._shards.folder.mkdir(parents=True, exist_ok=True)
        if self._num_lines:
            beside = self._shards.folder / "first.parquet.tmp"
            kept = islice(parquet_lines(self._path), self._num_lines)
            write_parquet(beside, self._shards.schema, kept)
            replace_durably(beside, self._shards.folder / "00000.parquet")
        self._path.unlink()
        self._shards.open(self._num_lines)


class ParquetFolder:
    """A folder of `.parquet` files with a card.

    Args:
        write_card: writes the card, told the shards and the number of rows.
    """

    def __init__(
        self,
        path: Path,
        folder: Path,
        schema: Schema,
        rows_per_shard: int,
        write_card: Callable[[int], None],
    ) -> None:
        self._path = path
        self._data = path / "data"
        self._shards = Shards(folder, schema, rows_per_shard, self._placed)
        self._write_card = write_card

    def stored(self) -> Iterator[bytes]:
        """The lines of the shards, moved or not, and of the journal."""
        return self._shards.stored()

    def open(self, kept: Extent) -> None:
        """Keep this many lines."""
        paths, num_lines = self._shards.paths, kept.num_lines
        # Of a run that is to be overwritten there may be more, numbered with gaps.
        if not num_lines:
            for path in self._data.glob("train-*-of-*.parquet"):
                path.unlink()
        elif paths and paths[0].parent == self._data and num_lines != sum(map(num_rows, paths)):
            self._take_back(paths)
        self._shards.open(num_lines)

    def append(self, lines: Sequence[bytes]) -> None:
        """Take lines."""
        self._shards.append(lines)

    @property
    def num_pending_bytes(self) -> int:
        """How much waits for `sync`."""
        return self._shards.num_pending_bytes

    def sync(self) -> None:
        """Make every line durable."""
        self._shards.sync()

    def finish(self) -> None:
        """Move the shards to where they belong, and write the card."""
        self._shards.finish()
        self._data.mkdir(parents=True, exist_ok=True)
        paths = self._shards.paths
        for number, path in enumerate(paths):
            path.replace(self._data / f"train-{number:05d}-of-{len(paths):05d}.parquet")
        sync_folder(self._data)
        self._write_card(sum(num_rows(path) for path in self._shards.paths))
        self._shards.clear()

    def close(self) -> None:
        """Let go of the files."""
        self._shards.close()

    def size(self) -> int:
        """Bytes of all shards and of the journal."""
        placed = self._data.glob("train-*-of-*.parquet")
        return self._shards.size() + sum(map(size_of, placed))

    def sha256(self) -> str | None:
        """The digest of what `sha256sum` says of all shards, in order."""
        paths = sorted(self._data.glob("train-*-of-*.parquet"))
        listing = "".join(f"{sha256_of(path)}  {path.name}\n" for path in paths)
        return hashlib.sha256(listing.encode()).hexdigest() if paths else None

    def _placed(self, number: int) -> Path | None:
        return next(iter(self._data.glob(f"train-{number:05d}-of-*.parquet")), None)

    def _take_back(self, paths: Sequence[Path]) -> None:
        self._shards.folder.mkdir(parents=True, exist_ok=True)
        for number, path in enumerate(paths):
            path.replace(self._shards.folder / f"{number:05d}.parquet")
