"""The native code's functions as functions over tensors, all in the CPU's memory.

Owns pointers and strides. What each function means is what its counterpart in torch means:
`attention` under a mask, `sampling.draw_in_order` after `sampling.in_order`, `linear`, `gelu`.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p

import torch
from torch import Tensor

from shoal_worker.engine.native import library
from shoal_worker.engine.params import RowParams
from shoal_worker.engine.quantized import FACTOR_BYTES

MAX_TOP_K = 64
PANEL = 24
_ROWS = 4
_KEPT = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.float16: 3}


@torch.library.custom_op("shoal::attend_live_cpu", mutates_args=())
def attend_live(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Attend over each slot's positions up to its own.

    Args:
        query: `[slots, head, key_dim]`.
        keys: `[slots, kv_head, kv_len, key_dim]`; int8 has a row's factor behind it.
        values: `[slots, kv_head, kv_len, value_dim]`, likewise.
        positions: `[slots]`, the last live position of each slot.
        scale: of the scores.

    Returns:
        `[slots, head, value_dim]`.
    """
    slots, num_heads, key_dim = query.shape
    _, kv_heads, kv_len, value_dim = values.shape
    value_dim -= FACTOR_BYTES * (values.dtype == torch.int8)
    wide = query.to(torch.float32).contiguous()
    output = torch.empty(slots, num_heads, value_dim)
    positions = positions.contiguous()
    library().shoal_attend(
        *map(_at, (wide, keys, values, output, positions)),
        *map(c_int64, (slots, num_heads, kv_heads, kv_len, key_dim, value_dim)),
        c_float(scale),
        c_int64(_KEPT[keys.dtype]),
    )
    return output.to(query.dtype)


@attend_live.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    value_dim = values.shape[3] - FACTOR_BYTES * (values.dtype == torch.int8)
    return query.new_empty(query.shape[0], query.shape[1], value_dim)


def draw(logits: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """Draw a token for each row.

    Args:
        logits: `[rows, vocab]`; the last dimension is contiguous.
        params: of the rows; larger top-k than `MAX_TOP_K` are taken for it.
        positions: `[rows]`, the new token's index in its completion.

    Returns:
        `[rows]`, int64.
    """
    logits = logits.to(torch.float32)
    assert logits.stride(1) == 1, "a row is read in order"
    rows, vocab = logits.shape
    tokens = torch.empty(rows, dtype=torch.int64)
    # Kept until the call returns: a contiguous copy has no other owner.
    floats = [x.contiguous() for x in (params.temperature, params.top_p, params.log_min_p)]
    integers = [x.contiguous() for x in (params.top_k, params.seed, params.sample, positions)]
    library().shoal_draw(
        _at(logits),
        *map(c_int64, (logits.stride(0), rows, vocab, MAX_TOP_K)),
        *map(_at, (*floats, *integers, tokens)),
    )
    return tokens


def packed(weight: Tensor) -> Tensor:
    """A weight in the order that `product` reads it in.

    Args:
        weight: `[columns, depth]`, float32, of any strides.

    Returns:
        `[panels, depth, 24]`.
    """
    columns, depth = weight.shape
    panels = torch.empty(-(-columns // PANEL), depth, PANEL)
    library().shoal_pack(
        _at(weight),
        *map(c_int64, weight.stride()),
        _at(panels),
        c_int64(columns),
        c_int64(depth),
    )
    return panels


@torch.library.custom_op("shoal::product", mutates_args=())
def product(
    states: Tensor, panels: Tensor, bias: Tensor | None, live: Tensor | None, columns: int
) -> Tensor:
    """A linear layer whose weight is packed.

    Args:
        states: `[rows, depth]`, float32.
        panels: from `packed`.
        bias: `[columns]`.
        live: `[rows]`, boolean; other rows are left out and come out as zeros. None: all are.
        columns: of the result.

    Returns:
        `[rows, columns]`.
    """
    states = states.contiguous()
    live = None if live is None else live.contiguous()
    rows, depth = states.shape
    scratch = torch.empty(-(-rows // _ROWS) * _ROWS, depth)
    output = torch.empty(rows, columns)
    library().shoal_product(
        _at(states),
        _at(panels),
        None if bias is None else _at(bias),
        None if live is None else _at(live),
        _at(scratch),
        _at(output),
        *map(c_int64, (rows, columns, depth)),
    )
    return output


@product.register_fake
def _(
    states: Tensor, panels: Tensor, bias: Tensor | None, live: Tensor | None, columns: int
) -> Tensor:
    return states.new_empty(states.shape[0], columns)


@torch.library.custom_op("shoal::gelu_cpu", mutates_args=())
def gelu(states: Tensor) -> Tensor:
    """GELU by its formula with tanh, of float32 in any shape."""
    states = states.contiguous()
    output = torch.empty_like(states)
    library().shoal_gelu(_at(states), _at(output), c_int64(states.numel()))
    return output


@gelu.register_fake
def _(states: Tensor) -> Tensor:
    return states.new_empty(states.shape)


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
