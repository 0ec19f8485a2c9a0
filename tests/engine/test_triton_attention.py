"""The decode kernel reads a slot's live positions, and no other slot or position changes a bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
# heads, key heads, key dimension, value dimension
SHAPES = [(12, 12, 64, 64), (4, 2, 16, 16), (32, 8, 128, 128), (6, 2, 24, 20), (7, 1, 80, 80)]
SLOTS, KV_LEN = 33, 300


def states(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heads, kv_heads, key_dim, value_dim = shape
    draw = torch.Generator("cuda").manual_seed(heads)

    def some(*size: int) -> Tensor:
        return torch.randn(size, generator=draw, device="cuda").to(dtype)

    cache = SLOTS, kv_heads, KV_LEN
    return some(SLOTS, heads, key_dim), some(*cache, key_dim), some(*cache, value_dim)


def attend_live(query: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
    from shoal_worker.engine.triton_attention import attend_live

    output: Tensor = attend_live(query, keys, values, positions, query.shape[-1] ** -0.5)
    return output


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_agrees_with_attention_under_a_mask(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    query, keys, values = states(shape, dtype)
    positions = torch.arange(SLOTS, device="cuda") * 9
    live = torch.arange(KV_LEN, device="cuda") <= positions[:, None]
    keys[0, :, 1:], values[0, :, 1:] = 0, 0

    output = attend_live(query, keys, values, positions)

    expected = scaled_dot_product_attention(
        query[:, :, None].double(),
        keys.double(),
        values.double(),
        attn_mask=live[:, None, None],
        enable_gqa=True,
    )[:, :, 0]
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_behind_a_position_and_in_other_slots_changes_no_bit(
    shape: tuple[int, int, int, int],
) -> None:
    query, keys, values = states(shape, torch.bfloat16)
    positions = torch.arange(SLOTS, device="cuda") * 9
    clean = attend_live(query, keys, values, positions)

    for tensor in (keys, values):
        tensor[::2] = torch.nan
        tensor[1, :, 10:] = torch.nan
    other_positions = positions.clone()
    other_positions[::2] = 299
    poisoned = attend_live(query, keys, values, other_positions)

    assert torch.equal(clean[1::2], poisoned[1::2])
