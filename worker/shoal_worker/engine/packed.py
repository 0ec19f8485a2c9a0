"""Linear layers whose weights are packed once, for the native product of a CPU without AVX-512.

A token's bits then follow from its row alone: no library's choice by the number of rows, their
place or the number of threads comes in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal_worker.engine.native_ops import packed, product


class PackedLinear(nn.Module):
    """A linear layer.

    Args:
        weight: `[columns, depth]`, float32.
        bias: `[columns]`.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.columns = weight.shape[0]
        self.panels = nn.Parameter(packed(weight.detach()), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., depth]` to `[..., columns]`."""
        rows = states.reshape(-1, states.shape[-1])
        output: Tensor = product(rows, self.panels, self.bias, self.columns)
        return output.view(*states.shape[:-1], self.columns)


def pays() -> bool:
    """Whether our product is faster than torch's: on two cores with AVX2 it is, see the README."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"


def pack_linear_layers(model: PreTrainedModel) -> None:
    """Replace a model's float32 linear layers, its output layer among them."""
    if model.device.type != "cpu" or model.dtype != torch.float32 or not pays():
        return
    head: Any = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is not head and (layer := _packed(child)) is not None:
                setattr(module, name, layer)
    if (layer := _packed(head)) is not None:
        model.set_output_embeddings(layer)


def _packed(layer: nn.Module) -> PackedLinear | None:
    # Subclasses may compute something else.
    if type(layer) is nn.Linear:
        return PackedLinear(layer.weight, layer.bias)
    if type(layer) is Conv1D:
        return PackedLinear(layer.weight.T, layer.bias)
    return None
