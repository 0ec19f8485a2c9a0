"""Keys and values as 8-bit integers, each head's at each position with a factor of its own.

A row of `dim` numbers becomes `dim` bytes and the four of its factor, a float32, right behind them:
one tensor, so that whoever reads a row has its factor at hand.
"""

from __future__ import annotations

import torch
from torch import Tensor

FACTOR_BYTES = torch.float32.itemsize
_LARGEST = 127.0
_SMALLEST_FACTOR = torch.finfo(torch.float32).tiny


def quantized(states: Tensor) -> Tensor:
    """`[..., dim]`, of any floating type, to int8, `[..., dim + 4]`."""
    wide = states.to(torch.float32)
    factors = wide.abs().amax(dim=-1, keepdim=True).div_(_LARGEST)
    numbers = (wide / factors.clamp_min(_SMALLEST_FACTOR)).round_().to(torch.int8)
    return torch.cat([numbers, factors.view(torch.int8)], dim=-1)


def restored(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """int8, `[..., dim + 4]`, to `[..., dim]` of a floating type."""
    numbers, factors = rows[..., :-FACTOR_BYTES], rows[..., -FACTOR_BYTES:]
    return (numbers * factors.contiguous().view(torch.float32)).to(dtype)
