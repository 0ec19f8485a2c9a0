"""Attention over slots, as a function that any transformers model calls from its own forward.

Owns what a row may read: its own prompt while it prefills, its slot's live positions while it
decodes. Knows no lane, no slot and no request; the cache has written keys and values before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from shoal.errors import ModelError
from shoal_worker.engine.quantized import restored

ATTENTION_NAME = "shoal"

# What models pass along that changes nothing here. Anything else would be lost in silence.
_NEUTRAL_ARGUMENTS = frozenset(
    {"cache_position", "is_causal", "position_ids", "return_dict", "use_cache"}
)


class Live(NamedTuple):
    """What a decode step reads of every slot: from its first position to the one it is at.

    Attributes:
        positions: `[slots]`, where each slot is.
        mask: `[slots, kv_len]`, the same as a mask; None where our own kernel reads.
    """

    positions: Tensor
    mask: Tensor | None


def register() -> None:
    """Make our attention known to transformers; once more does no harm."""
    AttentionInterface.register(ATTENTION_NAME, attend)
    AttentionMaskInterface.register(ATTENTION_NAME, no_mask)


def no_mask(*, mask_function: Callable[..., Any], **_: object) -> None:
    """No mask, because `attend` knows what each row may read, if that is what the model means.

    Raises:
        ModelError: the model wants another pattern than plain causal attention.
    """
    if mask_function is not causal_mask_function:
        raise ModelError("its attention is not plainly causal (sliding-window, chunked or prefix)")


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    live: Live | None = None,
    prompt_lengths: Tensor | None = None,
    calls: list[int] | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attend within a prompt, or over the live positions of every slot.

    Args:
        module: the model's attention layer.
        query: `[rows, head, length, head_dim]`.
        key: `[rows, kv_head, length, head_dim]` for prompts, else all of the lane's,
            `[slots, kv_head, kv_len, head_dim]`.
        value: as key.
        attention_mask: always None, see `no_mask`.
        scaling: of the scores; by default that of the head's size.
        dropout: always 0.
        live: what each slot may read; None for prompts.
        prompt_lengths: `[rows]`, for the CPU's native code; None where torch attends.
        calls: a list to append to, when somebody checks that the model comes through here.
        others: what else the model passes; refused unless it changes nothing.

    Returns:
        `[rows, length, head, head_dim]`.
    """
    if calls is not None:
        calls.append(len(calls))
    _refuse_unknown(module, attention_mask, dropout, others)
    if prompt_lengths is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.shoal.attend_prompts_cpu(query, key, value, prompt_lengths, scale), None
    if live is None:
        output = _attend_prompt(query, key, value, scaling)
    elif live.mask is not None:
        output = _attend_masked(query, key, value, scaling, live.mask)
    else:
        output = _attend_live(query, key, value, scaling, live.positions)
    return output.transpose(1, 2), None


def _attend_prompt(query: Tensor, key: Tensor, value: Tensor, scaling: float | None) -> Tensor:
    return scaled_dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )


def _attend_live(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, positions: Tensor
) -> Tensor:
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Triton's kernel on a GPU, the native code's on a CPU.
    attend_live = torch.ops.shoal.attend_live if query.is_cuda else torch.ops.shoal.attend_live_cpu
    output: Tensor = attend_live(query[:, :, 0], key, value, positions, scale)
    return output[:, :, None]


def _attend_masked(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, mask: Tensor
) -> Tensor:
    if key.dtype == torch.int8:
        key, value = restored(key, query.dtype), restored(value, query.dtype)
    slots, num_heads, length, head_dim = query.shape
    assert length == 1, "a decode step has one token a row"
    # The query heads that share a key head stand in the query's length: nothing is repeated.
    grouped = query.reshape(slots, key.shape[1], num_heads // key.shape[1], head_dim)
    output = scaled_dot_product_attention(
        grouped, key, value, attn_mask=mask[:, None, None, :], scale=scaling
    )
    return output.reshape(slots, num_heads, 1, value.shape[-1])


def _refuse_unknown(
    module: nn.Module, attention_mask: Tensor | None, dropout: float, others: dict[str, Any]
) -> None:
    if not getattr(module, "is_causal", True):
        raise ModelError("its attention looks at later tokens, as an encoder's does")
    if others.get("sliding_window") is not None:
        raise ModelError(f"it uses sliding-window attention ({others['sliding_window']} tokens)")
    if attention_mask is not None:
        raise ModelError("its attention adds a mask or bias of its own")
    if dropout:
        raise ModelError("its attention applies dropout although it is in evaluation mode")
    for name, value in others.items():
        if value is not None and value is not False and name not in _NEUTRAL_ARGUMENTS:
            raise ModelError(f"its attention takes {name!r}, which Shoal's does not know")


def live_mask(positions: Tensor, kv_len: int) -> Tensor:
    """Where each slot may read: from its first position to the one it is at.

    Args:
        positions: `[slots]`, the position of the token that each slot reads now.
        kv_len: positions of a slot.

    Returns:
        `[slots, kv_len]`, boolean.
    """
    return torch.arange(kv_len, device=positions.device) <= positions[:, None]
