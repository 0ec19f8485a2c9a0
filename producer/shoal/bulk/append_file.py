"""A file that only grows, by pieces that are durable or not there at all.

Owns what becomes of a write that fails half-way, as on a full disk: the file is cut back to what
was durable, the pieces are kept, and the next `sync` tries again.
"""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class AppendFile:
    """Pieces wait in memory until `sync`.

    Attributes:
        num_bytes: how much of the file is durable.
        num_pending_bytes: how much waits.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bytes = 0
        self.num_pending_bytes = 0
        self._pending: list[bytes] = []
        self._fd: int | None = None

    def open(self, num_bytes: int) -> None:
        """Open it with this much of its content; what is behind that is cut off."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self.num_bytes = num_bytes
        if os.fstat(self._fd).st_size != num_bytes:
            os.ftruncate(self._fd, num_bytes)

    def append(self, piece: bytes) -> None:
        """Take a piece; nothing is written yet."""
        self._pending.append(piece)
        self.num_pending_bytes += len(piece)

    def sync(self) -> None:
        """Make every piece durable.

        Raises:
            OSError: it cannot be written; what was durable still is, and the rest waits.
        """
        assert self._fd is not None, "the file is open"
        if not self._pending:
            return
        content = memoryview(b"".join(self._pending))
        try:
            self._write(content)
            os.fsync(self._fd)
        except OSError:
            # A torn piece is cut off when the run goes on, if not now.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.num_bytes)
            raise
        self.num_bytes += len(content)
        self._pending.clear()
        self.num_pending_bytes = 0

    def close(self) -> None:
        """Let go of the file, and of what waits."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _write(self, content: memoryview) -> None:
        assert self._fd is not None
        at = 0
        while at < len(content):
            at += os.pwrite(self._fd, content[at:], self.num_bytes + at)


def is_disk_full(error: BaseException) -> bool:
    """Whether there is no room, for now, to write in."""
    return isinstance(error, OSError) and error.errno in DISK_FULL
