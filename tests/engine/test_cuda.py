"""On a GPU the noise has the CPU's bits, and company changes nothing either."""

from __future__ import annotations

import pytest
import torch
from tests.engine.serving import TABLE, loaded_model, mixed_sequences, sequences, serve
from tests.tiny_models import Kind

from shoal_worker.engine import Engine
from shoal_worker.engine.random import gumbel, row_keys, token_bits
from shoal_worker.engine.sampling import in_order, likeliest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_noise_has_the_same_bits_as_on_the_cpu() -> None:
    seeds = torch.tensor([0, 42, 2**63 - 1])
    numbers = torch.arange(3)
    ids = torch.arange(50_257)
    keys = row_keys(seeds, numbers, numbers)

    keys_there = row_keys(seeds.cuda(), numbers.cuda(), numbers.cuda())

    assert torch.equal(keys_there.cpu(), keys)
    assert torch.equal(token_bits(keys_there, ids.cuda()).cpu(), token_bits(keys, ids))
    torch.testing.assert_close(gumbel(keys_there, ids.cuda()).cpu(), gumbel(keys, ids))


@pytest.mark.parametrize("num_tokens", [1, 50, 1000, 50_257])
def test_order_among_equals_is_the_cpu_s(num_tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(64, 50_257, generator=draw).to(torch.bfloat16).float()

    values, ids = in_order(logits.cuda(), num_tokens)

    expected_values, expected_ids = in_order(logits, num_tokens)
    assert torch.equal(ids.cpu(), expected_ids)
    assert torch.equal(values.cpu(), expected_values)
    assert torch.equal(likeliest(logits.cuda()).cpu(), expected_ids[:, 0])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_greedy_tokens_in_float32_are_the_cpu_s(kind: Kind) -> None:
    here, there = sequences(), sequences()

    serve(Engine(loaded_model(kind), TABLE), here)
    serve(Engine(loaded_model(kind, device="cuda"), TABLE), there)

    for one, other in zip(here, there, strict=True):
        assert one.output_token_ids == other.output_token_ids


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_company_changes_no_bit_on_a_gpu(kind: Kind, dtype: torch.dtype) -> None:
    loaded = loaded_model(kind, dtype=dtype, device="cuda")
    together = mixed_sequences()
    serve(Engine(loaded, TABLE), together)

    for one, alone in zip(together, mixed_sequences(), strict=True):
        serve(Engine(loaded, TABLE), [alone])
        assert one.output_token_ids == alone.output_token_ids
        assert one.output_logprobs == alone.output_logprobs
