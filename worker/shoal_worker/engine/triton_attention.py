"""Decode attention that reads a slot's live positions and nothing else, as one Triton kernel.

One program reads one slot's keys and values of one head, in blocks whose order and size follow from
the slot's own length; so no other slot can change a bit, and what lies behind the length is never
touched. The block size is fixed per shape: nothing is chosen by timing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of keys, times the heads that share them, that a program holds at once.
_BLOCK_ELEMENTS = 2048
_MIN_BLOCK_POSITIONS = 16
_NUM_WARPS = 2


@triton.jit
def _attend(
    query,
    keys,
    values,
    output,
    positions,
    scale,
    query_slot,
    query_head,
    key_slot,
    key_head,
    key_position,
    value_slot,
    value_head,
    value_position,
    GROUP: tl.constexpr,
    GROUP_PADDED: tl.constexpr,
    KEY_DIM: tl.constexpr,
    KEY_PADDED: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    VALUE_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    length = (tl.load(positions + slot) + 1).to(tl.int32)
    group = tl.arange(0, GROUP_PADDED)
    key_at = tl.arange(0, KEY_PADDED)
    value_at = tl.arange(0, VALUE_PADDED)
    heads = kv_head * GROUP + group
    q_mask = (group < GROUP)[:, None] & (key_at < KEY_DIM)[None, :]
    q_at = slot * query_slot + heads[:, None] * query_head + key_at[None, :]
    q = tl.load(query + q_at, mask=q_mask, other=0.0).to(tl.float32) * scale
    keys += slot * key_slot + kv_head * key_head
    values += slot * value_slot + kv_head * value_head
    largest = tl.full([GROUP_PADDED], float("-inf"), tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    sums = tl.zeros([GROUP_PADDED, VALUE_PADDED], tl.float32)
    for start in range(0, length, BLOCK):
        at = start + tl.arange(0, BLOCK)
        live = at < length
        k_mask = live[:, None] & (key_at < KEY_DIM)[None, :]
        k = tl.load(keys + at[:, None] * key_position + key_at[None, :], mask=k_mask, other=0.0)
        v_mask = live[:, None] & (value_at < VALUE_DIM)[None, :]
        v = tl.load(
            values + at[:, None] * value_position + value_at[None, :], mask=v_mask, other=0.0
        )
        if GROUP_PADDED == 1:
            scores = tl.sum(k.to(tl.float32) * q, axis=1)[None, :]
        else:
            scores = tl.sum(q[:, None, :] * k.to(tl.float32)[None, :, :], axis=2)
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_largest = tl.maximum(largest, tl.max(scores, axis=1))
        shrink = tl.exp(largest - new_largest)
        weights = tl.exp(scores - new_largest[:, None])
        if GROUP_PADDED == 1:
            new = tl.sum(v.to(tl.float32) * tl.reshape(weights, [BLOCK])[:, None], axis=0)[None, :]
        else:
            new = tl.sum(weights[:, :, None] * v.to(tl.float32)[None, :, :], axis=1)
        sums = sums * shrink[:, None] + new
        total = total * shrink + tl.sum(weights, axis=1)
        largest = new_largest
    out = sums / total[:, None]
    num_heads = tl.num_programs(1) * GROUP
    out_at = (slot * num_heads + heads)[:, None] * VALUE_DIM + value_at[None, :]
    out_mask = (group < GROUP)[:, None] & (value_at < VALUE_DIM)[None, :]
    tl.store(output + out_at, out.to(output.dtype.element_ty), mask=out_mask)


@torch.library.custom_op("shoal::attend_live", mutates_args=())
def attend_live(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float
) -> Tensor:
    """Attend over each slot's positions up to its own.

    Args:
        query: `[slots, head, key_dim]`.
        keys: `[slots, kv_head, kv_len, key_dim]`.
        values: `[slots, kv_head, kv_len, value_dim]`.
        positions: `[slots]`, the last live position of each slot.
        scale: of the scores.

    Returns:
        `[slots, head, value_dim]`.
    """
    slots, num_heads, key_dim = query.shape
    kv_heads, value_dim = values.shape[1], values.shape[3]
    group = num_heads // kv_heads
    padded = triton.next_power_of_2(group), triton.next_power_of_2(key_dim)
    output = query.new_empty(slots, num_heads, value_dim)
    query = query.contiguous()
    _attend[(slots, kv_heads)](
        query,
        keys,
        values,
        output,
        positions,
        scale,
        *query.stride()[:2],
        *keys.stride()[:3],
        *values.stride()[:3],
        GROUP=group,
        GROUP_PADDED=padded[0],
        KEY_DIM=key_dim,
        KEY_PADDED=padded[1],
        VALUE_DIM=value_dim,
        VALUE_PADDED=triton.next_power_of_2(value_dim),
        BLOCK=max(_MIN_BLOCK_POSITIONS, _BLOCK_ELEMENTS // (padded[0] * padded[1])),
        num_warps=_NUM_WARPS,
    )
    return output


@attend_live.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, scale: float) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], values.shape[3])
