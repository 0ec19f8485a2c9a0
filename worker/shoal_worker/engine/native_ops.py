"""The native code's functions as functions over tensors, all in the CPU's memory.

Owns pointers and strides. What each function means is what its counterpart in torch means:
`attention` under a mask, `sampling.draw_in_order` after `sampling.in_order`, `linear`, `gelu`.
"""

from __future__ import annotations

from ctypes import c_float, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from shoal_worker.engine.native import library
from shoal_worker.engine.params import RowParams
from shoal_worker.engine.quantized import FACTOR_BYTES

MAX_TOP_K = 64
_UNIT_BYTES = 4
_PROMPT_DTYPES = (torch.float32, torch.bfloat16)
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


def multiplies(dtype: torch.dtype) -> bool:
    """Whether `product` takes numbers of this type on this processor."""
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and bool(library().shoal_multiplies_bfloat16())
    )


def packed(weight: Tensor) -> Tensor:
    """A weight in the order that `product` reads it in.

    Args:
        weight: `[columns, depth]`, of a type that `multiplies`; in bfloat16 the depth is even.

    Returns:
        `[panels, units, columns of a panel, numbers of a unit]`; a unit has 32 bits.
    """
    columns, depth = weight.shape
    panel, in_unit = library().shoal_panel(), _UNIT_BYTES // weight.dtype.itemsize
    assert depth % in_unit == 0, f"{depth} numbers are no whole units"
    whole = pad(weight, (0, 0, 0, -columns % panel))
    return whole.view(-1, panel, depth // in_unit, in_unit).transpose(1, 2).contiguous()


@torch.library.custom_op("shoal::product", mutates_args=())
def product(
    states: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    live: Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """A linear layer whose weight is packed; it adds in float32.

    Args:
        states: `[rows, depth]`, of the weight's type.
        panels: from `packed`.
        bias: `[columns]`, float32.
        live: `[rows]`, boolean; other rows are left out and come out as zeros. None: all are.
        columns: of the result.
        dtype: of the result: the weight's, or float32.

    Returns:
        `[rows, columns]`.
    """
    states = states.contiguous()
    live = None if live is None else live.contiguous()
    output = torch.empty(states.shape[0], columns, dtype=dtype)
    _product_of(states.dtype, dtype)(
        _at(states),
        _at(panels),
        None if bias is None else _at(bias),
        None if live is None else _at(live),
        _at(output),
        *map(c_int64, (states.shape[0], columns, panels.shape[1], torch.get_num_threads())),
    )
    return output


def _product_of(states: torch.dtype, output: torch.dtype) -> Any:
    if states == torch.float32:
        return library().shoal_product
    if output == torch.float32:
        return library().shoal_product_widened
    return library().shoal_product_bfloat16


@product.register_fake
def _(
    states: Tensor,
    panels: Tensor,
    bias: Tensor | None,
    live: Tensor | None,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return states.new_empty(states.shape[0], columns, dtype=dtype)


@torch.library.custom_op("shoal::attend_prompts_cpu", mutates_args=())
def attend_prompts(
    query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float
) -> Tensor:
    """Attend within prompts: each position to itself and to those before it.

    Args:
        query: `[rows, head, length, key_dim]`, of any strides but the last, which is 1.
        key: `[rows, kv_head, length, key_dim]`, likewise.
        value: `[rows, kv_head, length, value_dim]`, likewise.
        lengths: `[rows]`, int64: what is behind them is never read, and comes out as zeros.
        scale: of the scores.

    Returns:
        `[rows, length, head, value_dim]`.
    """
    if query.dtype not in _PROMPT_DTYPES:
        wide = (x.to(torch.float32) for x in (query, key, value))
        narrow: Tensor = attend_prompts(*wide, lengths, scale)
        return narrow.to(query.dtype)
    rows, heads, length, key_dim = query.shape
    output = query.new_empty(rows, length, heads, value.shape[3])
    is_wide = query.dtype == torch.float32
    attend = library().shoal_attend_prompts if is_wide else library().shoal_attend_prompts_bfloat16
    attend(
        *(part for x in (query, key, value) for part in (_at(x), _strides(x))),
        _at(output),
        _at(lengths),
        *map(c_int64, (rows, heads, key.shape[1], length, key_dim, value.shape[3])),
        c_float(scale),
    )
    return output


@attend_prompts.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, lengths: Tensor, scale: float) -> Tensor:
    rows, heads, length, _ = query.shape
    return query.new_empty(rows, length, heads, value.shape[3])


@torch.library.custom_op("shoal::write_prompts_cpu", mutates_args={"cache"})
def write_prompts(
    states: Tensor, cache: Tensor, slots: Tensor, source: Tensor, lengths: Tensor
) -> None:
    """Write prompts' keys or values to the first positions of their slots.

    Args:
        states: `[rows, kv_head, length, dim]`, of the cache's type or to become it.
        cache: `[slots, kv_head, kv_len, dim]`, contiguous; int8 as `quantized` gives it.
        slots: `[rows]`, int64, where each row goes; rows that repeat the first one's are left out.
        source: `[rows]`, int64, the row of `states` that goes there.
        lengths: `[rows]`, int64, of the rows of `states`.
    """
    _, heads, kv_len, dim = cache.shape
    size = cache.dtype.itemsize
    library().shoal_write_prompts(
        _at(states),
        _strides(states, states.dtype.itemsize),
        *map(_at, (cache, slots, source, lengths)),
        *map(c_int64, (len(slots), heads, kv_len, dim * size, _from(states, cache))),
    )


@torch.library.custom_op("shoal::append_cpu", mutates_args={"cache"})
def append(states: Tensor, cache: Tensor, positions: Tensor) -> None:
    """Write new keys or values, each slot's at its own position.

    Args:
        states: `[slots, kv_head, dim]`, of the cache's type or to become it; a row is contiguous.
        cache: `[slots, kv_head, kv_len, dim]`, contiguous; int8 as `quantized` gives it.
        positions: `[slots]`, int64.
    """
    slots, heads, kv_len, dim = cache.shape
    size = cache.dtype.itemsize
    assert states.stride(2) == 1, "a row is copied as a whole"
    library().shoal_append(
        _at(states),
        *(c_int64(stride * states.dtype.itemsize) for stride in states.stride()[:2]),
        *map(_at, (cache, positions)),
        *map(c_int64, (slots, heads, kv_len, dim * size, _from(states, cache))),
    )


@append.register_fake
def _(states: Tensor, cache: Tensor, positions: Tensor) -> None:
    return None


@torch.library.custom_op("shoal::gelu_cpu", mutates_args=())
def gelu(states: Tensor) -> Tensor:
    """GELU by its formula with tanh, of float32 or bfloat16 in any shape."""
    states = states.contiguous()
    output = torch.empty_like(states)
    is_wide = states.dtype == torch.float32
    gelu_of = library().shoal_gelu if is_wide else library().shoal_gelu_bfloat16
    gelu_of(_at(states), _at(output), c_int64(states.numel()))
    return output


@gelu.register_fake
def _(states: Tensor) -> Tensor:
    return states.new_empty(states.shape)


def _from(states: Tensor, cache: Tensor) -> int:
    """How a row of states becomes one of the cache: -1 copies it."""
    if states.dtype == cache.dtype:
        return -1
    assert cache.dtype == torch.int8, "nothing else is converted"
    return _KEPT[states.dtype]


def _strides(tensor: Tensor, size: int = 1) -> Any:
    """Of all dimensions but the last, whose numbers lie side by side, in units of `size` bytes."""
    assert tensor.stride(-1) == 1, "a row is read in order"
    return (c_int64 * 3)(*(stride * size for stride in tensor.stride()[:3]))


def _at(tensor: Tensor) -> c_void_p:
    return c_void_p(tensor.data_ptr())
