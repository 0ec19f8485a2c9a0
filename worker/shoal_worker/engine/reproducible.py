"""What arithmetic needs so that a row's bits depend on nothing but the row.

MKL chooses kernels by the alignment of its arguments and by how rows fall to threads: with two
threads, float32 and no setting, equal rows of one product, or of one decode step's attention, come
out unequal. In its reproducible mode they are equal, at the same speed.

cuDNN's attention under a mask gives one row unequal bits when it is asked twice (torch 2.11, NVIDIA
H100 80GB, bfloat16, query length 1); torch's other attention kernels give equal ones.
"""

from __future__ import annotations

import os

import torch

MKL_MODE = "MKL_CBWR"


def pin_arithmetic() -> None:
    """Ask MKL for its reproducible mode, and do without cuDNN's attention.

    MKL listens until the process's first matrix product.
    """
    os.environ.setdefault(MKL_MODE, "AUTO")
    torch.backends.cuda.enable_cudnn_sdp(enabled=False)
