"""8-bit rows stay within half a step of what they keep, and attention reads them as they say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shoal_worker.engine.native_ops import append, attend_live, write_prompts
from shoal_worker.engine.quantized import quantized, restored


def test_a_row_comes_back_within_half_a_step_of_its_own_largest_number() -> None:
    rows = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(0))
    rows[2] *= 1000

    kept = quantized(rows)

    assert kept.dtype == torch.int8
    assert kept.shape == (5, 7, 68)
    step = rows.abs().amax(-1, keepdim=True) / 127
    assert ((restored(kept, torch.float32) - rows).abs() <= step * 0.501).all()


def test_zeros_stay_zeros() -> None:
    assert restored(quantized(torch.zeros(2, 8)), torch.float32).count_nonzero() == 0


@pytest.mark.parametrize("kv_heads", [4, 1])
def test_attention_reads_8_bit_rows_as_they_are_restored(kv_heads: int) -> None:
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 72, generator=draw)
    keys, values = (
        quantized(torch.randn(3, kv_heads, 20, dim, generator=draw)) for dim in (72, 70)
    )
    positions = torch.tensor([0, 11, 19])

    output = attend_live(query, keys, values, positions, 0.2)

    wide = [restored(rows, torch.float32) for rows in (keys, values)]
    expected = attend_live(query, *wide, positions, 0.2)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows_of_all_sizes(*shape: int, dtype: torch.dtype) -> Tensor:
    """Some of them zeros, and some whose numbers lie half-way between two steps."""
    states = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    states *= 10.0 ** torch.randint(-4, 4, (*shape[:-1], 1))
    states[0, 0] = 0
    states[1] = (torch.arange(states[1].numel()).view_as(states[1]) % 255 - 127) / 2
    return states.to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 40, 7])
def test_native_code_appends_the_same_bytes(dtype: torch.dtype, dim: int) -> None:
    # Heads and slots of a wider tensor, as a model hands them over.
    states = rows_of_all_sizes(5, 3, 2 * dim, dtype=dtype)[:, :, :dim]
    positions = torch.tensor([0, 3, 1, 9, 9])
    cache = torch.zeros(5, 3, 10, dim + 4, dtype=torch.int8)
    expected = cache.clone()

    append(states, cache, positions)

    expected[torch.arange(5), :, positions] = quantized(states)
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_native_code_writes_prompts_as_the_same_bytes(dtype: torch.dtype) -> None:
    states = rows_of_all_sizes(4, 3, 8, 64, dtype=dtype)
    cache = torch.zeros(6, 3, 10, 68, dtype=torch.int8)
    expected = cache.clone()
    slots, lengths = [4, 0, 5, 2], [8, 1, 3, 7]

    write_prompts(states, cache, *map(torch.tensor, (slots, [0, 1, 2, 3], lengths)))

    for row, (slot, length) in enumerate(zip(slots, lengths, strict=True)):
        expected[slot, :, :length] = quantized(states[row, :, :length])
    assert torch.equal(cache, expected)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_what_is_no_number_is_none(number: float) -> None:
    states = torch.ones(1, 1, 40)
    states[0, 0, 17] = number
    cache = torch.zeros(1, 1, 2, 44, dtype=torch.int8)

    append(states, cache, torch.tensor([1]))

    assert restored(cache[0, 0, 1], torch.float32).isnan().any()
    assert restored(quantized(states), torch.float32).isnan().any()
