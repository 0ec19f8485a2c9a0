"""The fused activation is the same function."""

from __future__ import annotations

import torch
from torch import nn
from transformers.activations import NewGELUActivation


def test_gelu_new_and_its_fused_form_are_the_same_function() -> None:
    numbers = torch.linspace(-12, 12, 100_001, dtype=torch.float64)

    fused = nn.GELU(approximate="tanh")(numbers)

    torch.testing.assert_close(fused, NewGELUActivation()(numbers), rtol=1e-12, atol=1e-14)
