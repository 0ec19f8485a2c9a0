"""Zstandard frames in a file: where each begins and ends, found without decompressing.

Only what our own writer makes is read: frames that say their content's size, as RFC 8878 has it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

_MAGIC = b"\x28\xb5\x2f\xfd"
_SIZE_BYTES = (0, 2, 4, 8)
_ID_BYTES = (0, 1, 2, 4)
_RLE_BLOCK = 1


@dataclass(frozen=True, slots=True)
class Frame:
    """A whole frame: where it begins, and what is in it."""

    start: int
    end: int
    content: bytes


def codec() -> Any:
    """What compresses and decompresses."""
    # Imported here: most runs have no use for it, and it takes a while.
    import pyarrow as pa  # noqa: PLC0415

    return pa.Codec("zstd")


def frames(file: BinaryIO) -> Iterator[Frame]:
    """The whole frames of a file, up to the first that is torn or none of ours."""
    decompress = codec().decompress
    start = 0
    while (found := _frame_at(file, start)) is not None:
        end, content_size = found
        file.seek(start)
        try:
            content = decompress(file.read(end - start), content_size, asbytes=True)
        except (OSError, ValueError):
            return
        yield Frame(start, end, content)
        start = end


def _frame_at(file: BinaryIO, start: int) -> tuple[int, int] | None:
    """The end of the frame that begins at `start`, and its content's size; None: there is none."""
    file.seek(start)
    if file.read(4) != _MAGIC or not (descriptor := file.read(1)):
        return None
    flags = descriptor[0]
    is_single, has_checksum = bool(flags & 0x20), bool(flags & 0x04)
    num_size_bytes = _SIZE_BYTES[flags >> 6] or int(is_single)
    before = file.read((0 if is_single else 1) + _ID_BYTES[flags & 3])
    size = file.read(num_size_bytes)
    if num_size_bytes == 0 or len(size) < num_size_bytes:
        return None
    content_size = int.from_bytes(size, "little") + (256 if num_size_bytes == 2 else 0)
    at = start + 5 + len(before) + num_size_bytes
    is_last = False
    while not is_last:
        file.seek(at)
        header = file.read(3)
        if len(header) < 3:
            return None
        word = int.from_bytes(header, "little")
        is_last, kind, block_bytes = bool(word & 1), word >> 1 & 3, word >> 3
        at += 3 + (1 if kind == _RLE_BLOCK else block_bytes)
    at += 4 if has_checksum else 0
    return (at, content_size) if at <= file.seek(0, 2) else None
