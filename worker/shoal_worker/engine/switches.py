"""torch's process-wide switches, set once before a model is loaded."""

from __future__ import annotations

from typing import Literal

import torch


def apply_switches(
    *,
    threads: int | None,
    matmul_precision: Literal["highest", "high", "medium"],
    cudnn_benchmark: bool,
) -> None:
    """Set them.

    Args:
        threads: of the CPU, for one operation; None leaves torch's choice.
        matmul_precision: of float32 matrix products, see `torch.set_float32_matmul_precision`.
        cudnn_benchmark: let cuDNN time its kernels and keep the fastest for each shape.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(matmul_precision)
    torch.backends.cudnn.benchmark = cudnn_benchmark
