"""8-bit rows stay within half a step of what they keep, and attention reads them as they say."""

from __future__ import annotations

import pytest
import torch

from shoal_worker.engine.native_ops import attend_live
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
