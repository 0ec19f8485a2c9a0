"""A padded output layer gives the unpadded one's logits."""

from __future__ import annotations

import torch
from tests.tiny_models import tiny_config, tiny_model

from shoal_worker.engine.output_layer import MULTIPLE, PaddedLinear, pad_output_layer


def test_padding_is_there_and_nobody_sees_it() -> None:
    weight = torch.randn(321, 16, generator=torch.Generator().manual_seed(0))
    states = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(1))

    layer = PaddedLinear(weight)

    assert layer.weight.shape[0] % MULTIPLE == 0
    assert layer(states).shape == (2, 3, 321)
    torch.testing.assert_close(layer(states), states @ weight.T)


def test_a_model_on_the_cpu_keeps_its_layer() -> None:
    model = tiny_model(tiny_config("gpt2", vocab_size=321))
    before = model.get_output_embeddings()

    pad_output_layer(model)

    assert model.get_output_embeddings() is before
