"""What the engine no longer does, put in the place of what it does, in this process alone.

Each way replaces a public name for as long as a stack is open. Where transformers 5 has no switch
back, it does what the old way did.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from shoal_worker.engine import attention
from shoal_worker.engine.attention import Live, live_mask

EAGER_ATTENTION = "shoal-bench-eager"
_ENGINE_METHODS = ("prefill", "decode", "release", "warm_up")


def load_by_state_dict(stack: ExitStack) -> None:
    """Load as before `low_cpu_mem_usage`: initialise the model, then copy all weights into it."""

    def from_pretrained(
        folder: Path,
        *,
        config: PreTrainedConfig,
        dtype: torch.dtype,
        attn_implementation: str,
        **_: Any,
    ) -> tuple[PreTrainedModel, dict[str, list[str]]]:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, attn_implementation=attn_implementation
        )
        state: dict[str, Tensor] = {}
        for file in sorted(folder.glob("*.safetensors")):
            # Read to the end, as torch.load did: a mapped file's pages would only be borrowed.
            state |= {name: tensor.clone() for name, tensor in load_file(file).items()}
        found = model.load_state_dict(state, strict=False)
        model.tie_weights()
        tied = set(model.all_tied_weights_keys or ())
        model.eval()
        nn.Module.to(model, dtype=dtype)
        return model, {"missing_keys": [key for key in found.missing_keys if key not in tied]}

    stack.enter_context(patch.object(AutoModelForCausalLM, "from_pretrained", from_pretrained))


def leave_inference_mode(engine: Any) -> None:
    """Run an engine's methods under `torch.no_grad`."""
    for name in _ENGINE_METHODS:
        bare = inspect.unwrap(getattr(type(engine), name))
        setattr(engine, name, torch.no_grad()(bare).__get__(engine))


def attend_eagerly(model: PreTrainedModel) -> None:
    """Have the model attend by matrices of scores and weights, as GPT-2's first code did."""
    AttentionInterface.register(EAGER_ATTENTION, eager_attention)
    AttentionMaskInterface.register(EAGER_ATTENTION, attention.no_mask)
    model.set_attn_implementation(EAGER_ATTENTION)


def eager_attention(
    _module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    *,
    live: Live | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """What `attention.attend` gives, and the weights, `[rows, head, length, kv_len]`.

    Arguments are as there.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = query @ key.transpose(2, 3) * scale
    if live is None:
        length = query.shape[2]
        allowed = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    else:
        allowed = live_mask(live.positions, key.shape[2])[:, None, None, :]
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2), weights


def call_with(model: PreTrainedModel, **arguments: Any) -> None:
    """Have every call of the model come with these arguments, whatever the caller says."""

    def add(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        return args, given | arguments

    model.register_forward_pre_hook(add, with_kwargs=True)
