"""Linear layers whose weights are packed once, for the CPU's native product.

A token's bits then follow from its row alone: no library's choice by the number of rows, their
place or the number of threads comes in. So rows that nobody reads can be left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from shoal_worker.engine.native_ops import multiplies, packed, product


class LiveRows:
    """Which tokens of a pass somebody reads: an idle slot's and a prompt's padding nobody does.

    Attributes:
        mask: `[rows, length]`, boolean; None where all are read.
    """

    def __init__(self) -> None:
        self.mask: Tensor | None = None

    @contextmanager
    def only(self, mask: Tensor) -> Iterator[None]:
        """Within the block, layers may leave out what the mask does not name."""
        self.mask = mask
        try:
            yield
        finally:
            self.mask = None


class PackedLinear(nn.Module):
    """A linear layer.

    Args:
        weight: `[columns, depth]`.
        bias: `[columns]`.
        live: of the model's passes.
        dtype: of the result; the weight's where not given.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        live: LiveRows,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._live = live
        self._dtype = dtype or weight.dtype
        self.columns = weight.shape[0]
        self.panels = nn.Parameter(packed(weight.detach()), requires_grad=False)
        bias = None if bias is None else bias.detach().to(torch.float32)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, states: Tensor) -> Tensor:
        """`[..., depth]` to `[..., columns]`."""
        rows = states.reshape(-1, states.shape[-1])
        mask = self._live.mask
        # A layer that is given other rows, such as the last token of each prompt, does them all.
        if mask is not None and mask.shape != states.shape[:-1]:
            mask = None
        output: Tensor = product(rows, self.panels, self.bias, mask, self.columns, self._dtype)
        return output.view(*states.shape[:-1], self.columns)


def pays(dtype: torch.dtype) -> bool:
    """Whether our product is faster than torch's in numbers of this type, see the README."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    # torch 2.11 does not say.
    known = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return multiplies(dtype) and not (dtype == torch.bfloat16 and known.get("amx_bf16", False))


def pack_linear_layers(model: PreTrainedModel) -> LiveRows | None:
    """Replace a model's linear layers, its output layer among them, where that pays.

    Returns:
        What tells them which rows to leave out; None where nothing was replaced.
    """
    if model.device.type != "cpu" or not pays(model.dtype):
        return None
    live = LiveRows()
    head: Any = model.get_output_embeddings()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if child is not head and (layer := _packed(child, live)) is not None:
                setattr(module, name, layer)
    # Logits are added in float32: rounding them to 16 bit would only make ties.
    if (layer := _packed(head, live, torch.float32)) is not None:
        model.set_output_embeddings(layer)
    return live


def _packed(
    layer: nn.Module, live: LiveRows, dtype: torch.dtype | None = None
) -> PackedLinear | None:
    # Subclasses may compute something else.
    if type(layer) is nn.Linear:
        weight, bias = layer.weight, layer.bias
    elif type(layer) is Conv1D:
        weight, bias = layer.weight.T, layer.bias
    else:
        return None
    is_odd = weight.shape[1] % 2 and weight.dtype == torch.bfloat16
    return None if is_odd else PackedLinear(weight, bias, live, dtype)
