"""Our attention is what a model runs, reads what it should, and refuses what it does not know."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.tiny_models import KINDS, Kind, tiny_config, tiny_model
from torch import Tensor, nn
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from shoal.errors import ModelError
from shoal_worker.engine.attention import ATTENTION_NAME, Live, attend, live_mask, no_mask, register
from shoal_worker.engine.cache import LaneCache, LayerShape, PromptWrite, TokenWrite
from shoal_worker.engine.probe import probe

CPU = torch.device("cpu")


def random_states(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """One head, one query, by the definition: `[head_dim]`."""
    scores: Tensor = keys @ query / query.shape[-1] ** 0.5
    return scores.softmax(dim=0) @ values


@pytest.mark.parametrize("kind", KINDS)
def test_every_layer_of_every_kind_runs_our_attention(kind: Kind) -> None:
    register()
    kv_heads = 4 if kind in ("gpt2", "opt", "gpt_neox") else 2

    shapes = probe(tiny_model(tiny_config(kind), ATTENTION_NAME))

    assert shapes == (LayerShape(kv_heads, 16, 16, torch.float32),) * 2


def test_a_model_that_runs_another_attention_is_refused() -> None:
    with pytest.raises(ModelError, match="0 of its layers call Shoal's attention"):
        probe(tiny_model(tiny_config("gpt2"), "sdpa"))


def test_two_models_of_one_configuration_keep_their_own_attention() -> None:
    register()
    config = tiny_config("llama")
    ours = tiny_model(config, ATTENTION_NAME)
    tiny_model(config, "eager")

    assert len(probe(ours)) == 2


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_slot_reads_its_live_mask_and_no_others(kv_heads: int) -> None:
    query = random_states(3, 4, 1, 8)
    keys, values = random_states(3, kv_heads, 10, 8), random_states(3, kv_heads, 10, 8) * 2
    positions = torch.tensor([0, 4, 9])

    output, _ = attend(
        nn.Module(), query, keys, values, None, live=Live(positions, live_mask(positions, 10))
    )

    for slot, position in enumerate(positions.tolist()):
        for head in range(4):
            kv_head = head * kv_heads // 4
            expected = attended(
                query[slot, head, 0],
                keys[slot, kv_head, : position + 1],
                values[slot, kv_head, : position + 1],
            )
            torch.testing.assert_close(output[slot, 0, head], expected)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_a_prompt_s_tokens_read_themselves_and_what_is_before(kv_heads: int) -> None:
    query = random_states(2, 4, 6, 8)
    keys, values = random_states(2, kv_heads, 6, 8), random_states(2, kv_heads, 6, 8) * 2

    output, _ = attend(nn.Module(), query, keys, values, None)

    for position in range(6):
        for head in range(4):
            kv_head = head * kv_heads // 4
            expected = attended(
                query[1, head, position],
                keys[1, kv_head, : position + 1],
                values[1, kv_head, : position + 1],
            )
            torch.testing.assert_close(output[1, position, head], expected)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"sliding_window": 64}, "sliding-window attention .64 tokens."),
        ({"softcap": 30.0}, "'softcap'"),
        ({"s_aux": torch.zeros(4)}, "'s_aux'"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_an_argument_that_would_change_the_outcome_is_refused(
    arguments: dict[str, Any], reason: str
) -> None:
    states = random_states(1, 4, 2, 8)

    with pytest.raises(ModelError, match=reason):
        attend(nn.Module(), states, states, states, None, **arguments)


def test_a_mask_or_an_encoder_s_attention_is_refused() -> None:
    states = random_states(1, 4, 2, 8)
    encoder = nn.Module()
    encoder.is_causal = False  # type: ignore[assignment]

    with pytest.raises(ModelError, match="mask or bias"):
        attend(nn.Module(), states, states, states, torch.zeros(1, 1, 2, 2))
    with pytest.raises(ModelError, match="later tokens"):
        attend(encoder, states, states, states, None)


def test_a_pattern_other_than_causal_is_refused() -> None:
    no_mask(mask_function=causal_mask_function, batch_size=1)
    with pytest.raises(ModelError, match="not plainly causal"):
        no_mask(mask_function=sliding_window_causal_mask_function(4), batch_size=1)


def a_cache(slots: int = 4, *, native: bool = False) -> LaneCache:
    return LaneCache([LayerShape(2, 8, 6, torch.float32)], slots, 16, CPU, native=native)


@pytest.mark.parametrize("native", [False, True])
def test_a_prompt_is_written_to_its_slot_without_its_padding(*, native: bool) -> None:
    cache = a_cache(native=native)
    lengths = torch.tensor([3, 5])
    padding = (torch.arange(8) >= lengths[:, None])[:, None, :, None]
    cache.write = PromptWrite(torch.tensor([2, 0]), torch.tensor([0, 1]), lengths, padding)
    keys, values = random_states(2, 2, 8, 8), random_states(2, 2, 8, 6)

    cache.update(keys, values, 0)

    assert torch.equal(cache.keys[0][2, :, :3], keys[0, :, :3])
    assert torch.equal(cache.values[0][0, :, :5], values[1, :, :5])
    assert cache.keys[0][2, :, 3:].count_nonzero() == 0
    assert cache.keys[0][[1, 3]].count_nonzero() == 0


@pytest.mark.parametrize("native", [False, True])
def test_an_unused_row_writes_what_the_first_row_writes(*, native: bool) -> None:
    cache = a_cache(native=native)
    padding = torch.zeros(3, 1, 8, 1, dtype=torch.bool)
    slots, source = torch.tensor([1, 1, 1]), torch.tensor([0, 0, 0])
    cache.write = PromptWrite(slots, source, torch.tensor([8, 8, 8]), padding)
    keys, values = random_states(3, 2, 8, 8), random_states(3, 2, 8, 6)

    cache.update(keys, values, 0)

    assert torch.equal(cache.keys[0][1, :, :8], keys[0])
    assert cache.keys[0][[0, 2, 3]].count_nonzero() == 0


@pytest.mark.parametrize("native", [False, True])
def test_a_token_is_written_at_each_slot_s_own_position(*, native: bool) -> None:
    cache = a_cache(native=native)
    cache.write = TokenWrite(torch.tensor([0, 5, 15, 2]))
    keys, values = random_states(4, 2, 1, 8), random_states(4, 2, 1, 6)

    all_keys, all_values = cache.update(keys, values, 0)

    for slot, position in enumerate([0, 5, 15, 2]):
        assert torch.equal(all_keys[slot, :, position], keys[slot, :, 0])
        assert torch.equal(all_values[slot, :, position], values[slot, :, 0])
    assert all_keys.count_nonzero() == keys.count_nonzero()


def test_clearing_zeroes_the_named_positions_of_the_named_slots() -> None:
    cache = a_cache()
    cache.keys[0].fill_(torch.nan)

    cache.clear(torch.tensor([1, 3]), 4, 16)

    assert cache.keys[0][[1, 3], :, 4:].count_nonzero() == 0
    assert cache.keys[0][[1, 3], :, :4].isnan().all()
    assert cache.keys[0][[0, 2]].isnan().all()


def test_a_forward_pass_that_does_not_say_where_it_writes_fails() -> None:
    states = random_states(4, 2, 1, 8)

    with pytest.raises(AssertionError, match="where it writes"):
        a_cache().update(states, states, 0)
