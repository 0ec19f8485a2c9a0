"""The fused activation is the same function."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.activations import NewGELUActivation

from shoal_worker.engine.native_ops import gelu


def test_gelu_new_and_its_fused_form_are_the_same_function() -> None:
    numbers = torch.linspace(-12, 12, 100_001, dtype=torch.float64)

    fused = nn.GELU(approximate="tanh")(numbers)

    torch.testing.assert_close(fused, NewGELUActivation()(numbers), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("count", [1, 7, 8, 1001])
def test_the_native_activation_is_the_same_function_wherever_a_number_lies(count: int) -> None:
    numbers = torch.linspace(-30, 30, 4004)[:: 4004 // count][:count]
    wide = numbers.double()
    # The formula's tanh would lose all digits of the left tail.
    twice = 2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)
    expected = wide * torch.sigmoid(twice)

    output = gelu(numbers)

    torch.testing.assert_close(output.double(), expected, rtol=2e-5, atol=1e-35)
    assert torch.equal(output, torch.cat([gelu(number[None]) for number in numbers]))


def test_the_native_activation_of_bfloat16_rounds_once() -> None:
    numbers = torch.linspace(-12, 12, 1001).to(torch.bfloat16)

    assert torch.equal(gelu(numbers), gelu(numbers.float()).to(torch.bfloat16))
