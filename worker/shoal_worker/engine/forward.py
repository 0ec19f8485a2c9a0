"""A model's own forward pass, the way a lane needs it: positions given, few logits made.

Owns how transformers is called. Knows neither lanes nor sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shoal_worker.engine.attention import Live, live_mask
from shoal_worker.engine.cache import LaneCache


def prompt_logits(
    model: PreTrainedModel,
    token_ids: Tensor,
    position_ids: Tensor,
    cache: LaneCache,
    last: Tensor,
    *,
    native: bool = False,
) -> Tensor:
    """Read prompts and give the logits after each one's last token.

    Args:
        model: runs with our attention.
        token_ids: `[rows, length]`, padded on the right.
        position_ids: `[rows, length]`.
        cache: knows where keys and values go.
        last: `[rows]`, where each row's prompt has its last token.
        native: attend by the CPU's native code, which leaves padding out.

    Returns:
        `[rows, vocab]`; logits of other positions are never made.
    """
    with _only_last(model, last):
        output = model(
            input_ids=token_ids,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
            prompt_lengths=last + 1 if native else None,
        )
    logits: Tensor = output.logits
    return logits[:, 0] if logits.shape[1] == 1 else _pick(logits, last)[:, 0]


def next_logits(
    model: PreTrainedModel,
    tokens: Tensor,
    positions: Tensor,
    cache: LaneCache,
    *,
    masked: bool = True,
) -> Tensor:
    """Read one token in every slot and give the logits after it.

    Args:
        model: runs with our attention.
        tokens: `[slots]`.
        positions: `[slots]`.
        cache: knows where keys and values go.
        masked: attend under a mask; else by our own kernel, which reads live positions only.

    Returns:
        `[slots, vocab]`.
    """
    live = Live(positions, live_mask(positions, cache.kv_len) if masked else None)
    output = model(
        input_ids=tokens[:, None],
        position_ids=positions[:, None],
        past_key_values=cache,
        use_cache=True,
        live=live,
    )
    logits: Tensor = output.logits
    return logits[:, 0]


@contextmanager
def _only_last(model: PreTrainedModel, last: Tensor) -> Iterator[None]:
    """Hand the output layer one position a row: over all of them its result would be huge."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Module):
        yield
        return

    def pick(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_pick(inputs[0], last), *inputs[1:])

    hook = head.register_forward_pre_hook(pick)
    try:
        yield
    finally:
        hook.remove()


def _pick(states: Tensor, last: Tensor) -> Tensor:
    """From `[rows, length, n]` one position of each row: `[rows, 1, n]`."""
    return states[torch.arange(len(last), device=last.device), last][:, None]
