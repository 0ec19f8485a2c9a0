"""Noise for sampling: a pure function of seed, sample, position and token id.

No generator and no state: the same four numbers give the same noise on every device, in every row
of every batch, in whatever order they are asked for. Integer arithmetic is SplitMix64's (Steele,
Lea and Flood, 2014), modulo 2**64 in int64 tensors.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTOR_1 = _signed(0xBF58476D1CE4E5B9)
_FACTOR_2 = _signed(0x94D049BB133111EB)


def row_keys(seeds: Tensor, samples: Tensor, positions: Tensor) -> Tensor:
    """One key for each row's next token.

    Args:
        seeds: `[rows]`, int64.
        samples: `[rows]`, the number of the completion among those of its request.
        positions: `[rows]`, the new token's index in the completion.

    Returns:
        `[rows]`, int64.
    """
    keys = _mix(seeds + _GAMMA)
    keys = _mix(keys + (samples + 1) * _GAMMA)
    return _mix(keys + (positions + 1) * _GAMMA)


def token_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """64 random bits for each token: those that SplitMix64 seeded with the key gives at its id.

    Args:
        keys: `[rows]`, from `row_keys`.
        token_ids: `[rows, tokens]`, or `[tokens]` for all rows alike.

    Returns:
        `[rows, tokens]`, int64.
    """
    return _mix((token_ids + 1) * _GAMMA + keys[:, None])


def gumbel(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise: its argmax with log-weights added samples by those weights.

    Args:
        keys: `[rows]`, from `row_keys`.
        token_ids: `[rows, tokens]`, or `[tokens]` for all rows alike.

    Returns:
        `[rows, tokens]`, float64, finite.
    """
    # 52 bits and a half: 53 would round up to a uniform of exactly 1 and infinite noise.
    uniform = _shifted(token_bits(keys, token_ids), 12).to(torch.float64)
    uniform.add_(0.5).mul_(2.0**-52)
    return uniform.log_().neg_().log_().neg_()


def _mix(bits: Tensor) -> Tensor:
    bits = (bits ^ _shifted(bits, 30)).mul_(_FACTOR_1)
    bits = bits.bitwise_xor_(_shifted(bits, 27)).mul_(_FACTOR_2)
    return bits.bitwise_xor_(_shifted(bits, 31))


def _shifted(bits: Tensor, distance: int) -> Tensor:
    # int64 shifts copy the sign downwards; the mask makes it a shift of unsigned bits.
    return (bits >> distance).bitwise_and_((1 << (64 - distance)) - 1)
