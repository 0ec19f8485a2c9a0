"""The native code means what torch's functions mean, and a row's bits follow from the row alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from shoal_worker.engine.native_ops import (
    MAX_TOP_K,
    attend_live,
    attend_prompts,
    draw,
    multiplies,
    packed,
    product,
)
from shoal_worker.engine.params import RowParams
from shoal_worker.engine.sampling import draw_in_order, in_order

ROWS = 40


def random_tensor(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Numbers that products take, where this processor multiplies them."""
    if not multiplies(request.param):
        pytest.skip(f"this processor does not multiply {request.param}")
    assert isinstance(request.param, torch.dtype)
    return request.param


@pytest.mark.parametrize("rows", [1, 3, 8, 9, 130])
@pytest.mark.parametrize(("columns", "depth"), [(24, 16), (320, 64), (97, 600), (1, 2)])
def test_a_product_is_torch_s(rows: int, columns: int, depth: int, dtype: torch.dtype) -> None:
    states, weight = random_tensor(rows, depth), random_tensor(columns, depth, seed=1)
    states, weight, bias = states.to(dtype), weight.to(dtype), random_tensor(columns, seed=2)
    expected = linear(states.float(), weight.float(), bias)

    for weights in (weight, weight.T.contiguous().T):
        output = product(states, packed(weights), bias, None, columns, torch.float32)
        torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-4)
    no_bias = product(states, packed(weight), None, None, columns, torch.float32)
    torch.testing.assert_close(no_bias, expected - bias, rtol=1e-5, atol=1e-4)

    narrow = product(states, packed(weight), bias, None, columns, dtype)
    assert torch.equal(narrow, output.to(dtype))


def test_a_row_of_a_product_has_the_same_bits_among_any_others_and_on_any_threads(
    dtype: torch.dtype,
) -> None:
    states, panels = product_of(130, 320, dtype)
    alone = torch.cat([product(row[None], panels, None, None, 320, dtype) for row in states])

    order = torch.randperm(130, generator=torch.Generator().manual_seed(0))
    shuffled = product(states[order], panels, None, None, 320, dtype)
    torch.set_num_threads(2)
    try:
        on_two = product(states, panels, None, None, 320, dtype)
    finally:
        torch.set_num_threads(1)

    assert torch.equal(shuffled, alone[order])
    assert torch.equal(on_two, alone)


@pytest.mark.parametrize("count", [0, 1, 77, 130])
@pytest.mark.parametrize("columns", [24, 97])
def test_rows_that_are_not_live_are_left_out_of_a_product(
    count: int, columns: int, dtype: torch.dtype
) -> None:
    states, panels = product_of(130, columns, dtype)
    states[::2] *= torch.inf  # What is left out may hold anything.
    bias = random_tensor(columns, seed=2)
    order = torch.randperm(130, generator=torch.Generator().manual_seed(count))
    live = torch.zeros(130, dtype=torch.bool)
    live[order[:count]] = True

    output = product(states, panels, bias, live, columns, dtype)

    whole = product(states, panels, bias, None, columns, dtype)
    assert torch.equal(output[live].nan_to_num(), whole[live].nan_to_num())
    assert not output[~live].any()


def product_of(rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and packed weights of a layer."""
    states, weight = random_tensor(rows, 600), random_tensor(columns, 600, seed=1)
    return states.to(dtype), packed(weight.to(dtype))


PROMPT_SHAPES = [(4, 4, 37, 64, 64), (4, 2, 96, 80, 136), (4, 1, 5, 8, 6)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "length", "key_dim", "value_dim"), PROMPT_SHAPES)
def test_attention_within_prompts_is_torch_s_and_reads_no_padding(
    dtype: torch.dtype, heads: int, kv_heads: int, length: int, key_dim: int, value_dim: int
) -> None:
    # As models hand them over: the heads of a position lie side by side.
    query, key, value = (
        random_tensor(3, length, heads_of_it, dim, seed=seed).to(dtype).transpose(1, 2)
        for seed, (heads_of_it, dim) in enumerate(
            ((heads, key_dim), (kv_heads, key_dim), (kv_heads, value_dim))
        )
    )
    lengths = torch.tensor([length, 1, length // 2])
    group = heads // kv_heads
    expected = scaled_dot_product_attention(
        query.float(),
        key.float().repeat_interleave(group, dim=1),
        value.float().repeat_interleave(group, dim=1),
        is_causal=True,
        scale=0.3,
    )
    padding = torch.arange(length) >= lengths[:, None]
    for tensor in (query, key, value):
        tensor.masked_fill_(padding[:, None, :, None], torch.nan)

    output = attend_prompts(query, key, value, lengths, 0.3)

    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(
        output[~padding].float(),
        expected.transpose(1, 2)[~padding],
        rtol=tolerance,
        atol=tolerance,
    )
    assert not output[padding].any()


def test_a_position_of_a_prompt_has_the_same_bits_in_any_company_and_on_any_threads() -> None:
    states = random_tensor(3, 4, 50, 16)
    whole = attend_prompts(states, states, states, torch.tensor([50, 50, 50]), 0.25)

    shorter = states[1:2, :, :23]
    alone = attend_prompts(shorter, shorter, shorter, torch.tensor([22]), 0.25)
    torch.set_num_threads(2)
    try:
        on_two = attend_prompts(states, states, states, torch.tensor([50, 50, 50]), 0.25)
    finally:
        torch.set_num_threads(1)

    assert torch.equal(alone[0, :22], whole[1, :22])
    assert torch.equal(on_two, whole)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("key_dim", "value_dim"), [(64, 64), (8, 6), (80, 136)])
def test_attention_over_live_positions_is_torch_s(
    dtype: torch.dtype, kv_heads: int, key_dim: int, value_dim: int
) -> None:
    slots, kv_len = 5, 40
    query = random_tensor(slots, 4, key_dim).to(dtype)
    keys = random_tensor(slots, kv_heads, kv_len, key_dim, seed=1).to(dtype)
    values = random_tensor(slots, kv_heads, kv_len, value_dim, seed=2).to(dtype)
    positions = torch.tensor([0, 4, 7, 30, 39])

    output = attend_live(query, keys, values, positions, 0.3)

    for slot, position in enumerate(positions.tolist()):
        live = slice(0, position + 1)
        key = keys[slot, :, live].float().repeat_interleave(4 // kv_heads, dim=0)
        value = values[slot, :, live].float().repeat_interleave(4 // kv_heads, dim=0)
        scores = (key @ query[slot].float()[:, :, None])[..., 0] * 0.3
        expected = (scores.softmax(-1)[:, None] @ value)[:, 0]
        tolerance = 1e-5 if dtype == torch.float32 else 2e-2
        torch.testing.assert_close(output[slot].float(), expected, rtol=tolerance, atol=tolerance)


def test_what_is_behind_a_slot_s_position_is_never_read() -> None:
    query, positions = random_tensor(3, 4, 16), torch.tensor([0, 9, 20])
    keys, values = random_tensor(3, 4, 32, 16, seed=1), random_tensor(3, 4, 32, 16, seed=2)
    clean = attend_live(query, keys, values, positions, 0.25)

    behind = torch.arange(32) > positions[:, None]
    keys.masked_fill_(behind[:, None, :, None], torch.nan)
    values.masked_fill_(behind[:, None, :, None], torch.nan)

    assert torch.equal(attend_live(query, keys, values, positions, 0.25), clean)


def test_large_scores_overflow_nothing() -> None:
    query = torch.full((1, 1, 16), 100.0)
    keys = torch.linspace(-100, 100, 32)[None, None, :, None].expand(1, 1, 32, 16).contiguous()
    values = torch.arange(32.0)[None, None, :, None].expand(1, 1, 32, 16).contiguous()

    output = attend_live(query, keys, values, torch.tensor([31]), 1.0)

    assert torch.equal(output, torch.full((1, 1, 16), 31.0))


def params_of(seed: int) -> RowParams:
    """Every combination of limits, in random rows."""
    draws = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(ROWS, generator=draws, dtype=torch.float64)

    def some(values: Tensor, otherwise: float) -> Tensor:
        return torch.where(uniform() < 0.5, values, otherwise)

    return RowParams(
        temperature=uniform() * 2 + 0.05,
        top_k=torch.randint(1, MAX_TOP_K + 1, (ROWS,), generator=draws),
        top_p=some(uniform().clamp_min(0.01), 1.0),
        log_min_p=some(uniform().log(), -torch.inf),
        seed=torch.randint(0, 2**63 - 1, (ROWS,), generator=draws),
        sample=torch.randint(0, 5, (ROWS,), generator=draws),
    )


def logits_of(kind: str, vocab_size: int) -> Tensor:
    logits = random_tensor(ROWS, vocab_size, seed=vocab_size).mul_(3)
    if kind == "ties":
        return logits.round_()
    if kind == "equal":
        return logits.zero_().index_fill_(1, torch.tensor([7]), -0.0)
    if kind == "ruled out":
        return logits.masked_fill_(logits < 5, -torch.inf)
    return logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "ruled out"])
@pytest.mark.parametrize("vocab_size", [70, 320, 50_257])
def test_the_native_draw_is_the_functions_draw(
    vocab_size: int, kind: str, dtype: torch.dtype
) -> None:
    logits = logits_of(kind, vocab_size).to(dtype)
    params, positions = params_of(vocab_size), torch.arange(ROWS)

    tokens = draw(logits, params, positions)

    values, ids = in_order(logits.float(), MAX_TOP_K)
    assert torch.equal(tokens, draw_in_order(values, ids, params, positions))


def test_rows_may_be_views_of_wider_ones_and_narrower_than_top_k() -> None:
    wide = torch.full((ROWS, 512), 1e9)
    wide[:, :20] = logits_of("random", 20)
    params, positions = params_of(0), torch.arange(ROWS)
    params.top_k.clamp_(max=20)

    tokens = draw(wide[:, :20], params, positions)

    values, ids = in_order(wide[:, :20], 20)
    assert torch.equal(tokens, draw_in_order(values, ids, params, positions))


def test_logits_that_are_no_numbers_and_empty_parameters_harm_nothing() -> None:
    tokens = draw(
        torch.full((3, 100), torch.nan),
        RowParams.empty(3, torch.device("cpu")),
        torch.zeros(3).long(),
    )

    assert tokens.tolist() == [0, 0, 0]
