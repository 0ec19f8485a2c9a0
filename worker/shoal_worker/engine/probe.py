"""One token through a model, to see that its attention is ours and what its layers keep.

A model that transformers runs is not always one that we can run on slots; a class's attributes tell
part of it, this tells the rest.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedModel

from shoal.errors import ModelError
from shoal_worker.engine.cache import LayerShape
from shoal_worker.engine.support import one_line, unsupported


class _ShapeCache(Cache):
    """Keeps nothing but the shapes of what it is given."""

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.shapes: dict[int, LayerShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        self.shapes[layer_idx] = LayerShape(
            kv_heads=key_states.shape[1],
            key_dim=key_states.shape[3],
            value_dim=value_states.shape[3],
            dtype=key_states.dtype,
        )
        return key_states, value_states


@torch.inference_mode()
def probe(model: PreTrainedModel) -> tuple[LayerShape, ...]:
    """What each layer keeps for a token.

    Raises:
        ModelError: a layer's attention does not come through ours, or wants more than it does.
    """
    name, kind = type(model).__name__, model.config.model_type
    cache = _ShapeCache()
    calls: list[int] = []
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
    try:
        model(
            input_ids=token, position_ids=token, past_key_values=cache, use_cache=True, calls=calls
        )
    # A ModelError is our attention's; the rest is how models fail that expect another cache.
    except (ModelError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise unsupported(name, kind, one_line(error)) from None
    layers = sorted(cache.shapes)
    if not layers or layers != list(range(len(calls))):
        raise unsupported(
            name,
            kind,
            f"{len(calls)} of its layers call Shoal's attention and {len(layers)} keep "
            "keys and values, one after the other",
        )
    return tuple(cache.shapes[layer] for layer in layers)
