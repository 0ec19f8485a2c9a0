"""What the CPU's arithmetic needs so that a row's bits do not depend on its place in a batch.

MKL chooses kernels by the alignment of its arguments and by how rows fall to threads: with two
threads, float32 and no setting, equal rows of one product, or of one decode step's attention, come
out unequal. In its reproducible mode they are equal, at the same speed.
"""

from __future__ import annotations

import os

MKL_MODE = "MKL_CBWR"


def pin_arithmetic() -> None:
    """Ask MKL for its reproducible mode; it listens until the process's first matrix product."""
    os.environ.setdefault(MKL_MODE, "AUTO")
