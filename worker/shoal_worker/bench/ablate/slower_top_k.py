"""Slower ways to draw from the k likeliest tokens, in the place of the engine's.

`sort` and `unordered` find candidates otherwise and draw from them as the engine does, so that its
tokens are the same (but for ties). `scatter` and `mask` do what write-ups do: keep `[rows, vocab]`,
then softmax and multinomial, with torch's random numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from importlib.util import find_spec
from unittest.mock import patch

import torch
from torch import Tensor

from shoal_worker.bench.ablate.arms import TopK
from shoal_worker.engine import native_ops, sampling
from shoal_worker.engine.params import RowParams


def select_by(way: TopK, stack: ExitStack) -> None:
    """Replace the engine's selection for as long as the stack is open."""
    if way in _FINDERS:
        stack.enter_context(patch.object(sampling, "in_order", _FINDERS[way]))
    if way in FILTERS:
        _draw_from_vocabulary(FILTERS[way], stack)


def draw_after_the_pass(stack: ExitStack) -> None:
    """Have engines made while the stack is open draw here, not by a kernel within a step."""
    stack.enter_context(patch.object(native_ops, "draw", None))
    if torch.cuda.is_available() and find_spec("triton") is not None:
        kernel = import_module("shoal_worker.engine.triton_draw")
        stack.enter_context(patch.object(kernel, "MAX_VOCAB", 0))


def _by_sort(logits: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    return values[:, :num_tokens], ids[:, :num_tokens]


def _as_topk_likes(logits: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    values, ids = logits.topk(num_tokens, dim=-1)
    return values, ids


def by_scatter(logits: Tensor, num_tokens: int) -> Tensor:
    """`[rows, vocab]`, minus infinity but for exactly k tokens."""
    values, ids = logits.topk(num_tokens, dim=-1)
    return torch.full_like(logits, -torch.inf).scatter(1, ids, values)


def by_mask(logits: Tensor, num_tokens: int) -> Tensor:
    """`[rows, vocab]`, minus infinity below the k-th value: ties with it stay."""
    kth = logits.topk(num_tokens, dim=-1).values[:, -1:]
    return logits.masked_fill(logits < kth, -torch.inf)


_FINDERS: dict[TopK, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "sort": _by_sort,
    "unordered": _as_topk_likes,
}
FILTERS: dict[TopK, Callable[[Tensor, int], Tensor]] = {"scatter": by_scatter, "mask": by_mask}


def _draw_from_vocabulary(keep: Callable[[Tensor, int], Tensor], stack: ExitStack) -> None:
    def filtered(logits: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        return keep(logits, num_tokens), logits

    def draw(kept: Tensor, _ids: Tensor, params: RowParams, _positions: Tensor) -> Tensor:
        scaled = kept / params.temperature.to(kept.dtype)[:, None]
        return torch.multinomial(scaled.softmax(dim=-1), num_samples=1)[:, 0]

    stack.enter_context(patch.object(sampling, "in_order", filtered))
    stack.enter_context(patch.object(sampling, "draw_in_order", draw))
