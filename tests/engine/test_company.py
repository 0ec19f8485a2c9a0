"""A sequence's bits do not depend on its company, its place, or what was there before it."""

from __future__ import annotations

import pytest
import torch
from tests.engine.serving import (
    TABLE,
    decode,
    loaded_model,
    mixed_sequences,
    prefill,
    random_prompt,
    sequence,
    sequences,
    serve,
)
from tests.tiny_models import Kind
from torch import nn

from shoal_worker.engine import Engine
from shoal_worker.engine.options import EngineOptions
from shoal_worker.engine.packed import pays
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.scheduler import Row
from shoal_worker.sequence import Sequence

LANE = LaneSpec("bulk", 4, 128)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("gpt2", torch.float32), ("gpt2", torch.bfloat16), ("qwen3", torch.float32)],
)
def test_a_sequence_gets_the_same_bits_alone_as_in_company(kind: Kind, dtype: torch.dtype) -> None:
    loaded = loaded_model(kind, dtype=dtype)
    together = mixed_sequences()
    serve(Engine(loaded, TABLE), together)

    for one, alone in zip(together, mixed_sequences(), strict=True):
        serve(Engine(loaded, TABLE), [alone])
        assert one.output_token_ids == alone.output_token_ids
        assert one.output_logprobs == alone.output_logprobs


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_with_int8_keys_and_values_company_changes_no_bit_either(kind: Kind, kernels: bool) -> None:
    loaded, options = loaded_model(kind), EngineOptions(kv_dtype="int8", kernels=kernels)
    together, alone = mixed_sequences(), mixed_sequences()
    serve(Engine(loaded, TABLE, options), together)

    for one in alone:
        serve(Engine(loaded, TABLE, options), [one])
        other = together[one.key.request_index]
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_several_threads_a_sequence_s_bits_still_ignore_its_place(dtype: torch.dtype) -> None:
    # Five rows on two threads: without MKL's reproducible mode their places show.
    lane = LaneSpec("bulk", 5, 64)
    loaded = loaded_model(dtype=dtype)
    torch.set_num_threads(2)
    try:
        together, alone = [sequences((20,) * 5, max_tokens=4, logprobs=20) for _ in range(2)]
        serve(Engine(loaded, LaneTable([lane])), together)
        for one, other in zip(together, alone, strict=True):
            serve(Engine(loaded, LaneTable([lane])), [other])
            assert one.output_logprobs == other.output_logprobs
    finally:
        torch.set_num_threads(1)


def test_the_slot_and_the_order_of_arrival_change_no_bit() -> None:
    loaded = loaded_model()
    forwards, backwards = mixed_sequences(), mixed_sequences()

    serve(Engine(loaded, TABLE), forwards)
    serve(Engine(loaded, TABLE), reversed(backwards))

    for one, other in zip(forwards, backwards, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


def poison_slot(engine: Engine, slot: int, stop: int = LANE.kv_len) -> None:
    """Fill a slot's keys and values with NaN up to a position."""
    cache = engine.lanes[LANE.name].cache
    with torch.inference_mode():
        for tensor in (*cache.keys, *cache.values):
            tensor[slot, :, :stop] = torch.nan


def test_nan_in_idle_slots_changes_no_bit_of_the_others() -> None:
    loaded = loaded_model()

    def run(*, poisoned: bool) -> list[Sequence]:
        engine = Engine(loaded, LaneTable([LANE]))
        rows = [Row(1, mixed_sequences()[3]), Row(3, mixed_sequences()[7])]
        prefill(engine, LANE, rows[0])
        prefill(engine, LANE, rows[1])
        if poisoned:
            poison_slot(engine, 0)
            poison_slot(engine, 2)
        decode(engine, LANE, *rows, num_steps=2)
        return [row.sequence for row in rows]

    for clean, other in zip(run(poisoned=False), run(poisoned=True), strict=True):
        assert clean.output_token_ids == other.output_token_ids
        assert clean.output_logprobs == other.output_logprobs


def test_nan_that_a_sequence_left_behind_does_not_reach_the_next_one_in_its_slot() -> None:
    engine = Engine(loaded_model(), LaneTable([LANE]))
    broken = sequence(random_prompt(1, 70), max_tokens=20)
    prefill(engine, LANE, Row(2, broken))
    decode(engine, LANE, Row(2, broken), num_steps=3)
    poison_slot(engine, 2, stop=broken.num_positions)
    engine.release(LANE, 2)

    following = sequence(random_prompt(2, 5), max_tokens=40, logprobs=1)
    prefill(engine, LANE, Row(2, following))
    decode(engine, LANE, Row(2, following), num_steps=30)

    clean = sequence(random_prompt(2, 5), max_tokens=40, logprobs=1)
    engine = Engine(loaded_model(), LaneTable([LANE]))
    prefill(engine, LANE, Row(0, clean))
    decode(engine, LANE, Row(0, clean), num_steps=30)
    assert following.output_token_ids == clean.output_token_ids
    assert following.output_logprobs == clean.output_logprobs


def test_nan_in_padding_and_in_unused_rows_reaches_no_prompt() -> None:
    loaded = loaded_model(tie_word_embeddings=False)
    # Token 0 pads prompts, fills unused rows and is what idle slots read; nobody generates it.
    asked = {"max_tokens": 6, "logprobs": 1, "logit_bias": {0: -100.0}}
    clean, poisoned = sequences((3, 40), **asked), sequences((3, 40), **asked)
    serve(Engine(loaded, TABLE), clean)

    embedding = loaded.model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    with torch.no_grad():
        embedding.weight[0] = torch.nan
    serve(Engine(loaded, TABLE), poisoned)

    for one, other in zip(clean, poisoned, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


@pytest.mark.skipif(not pays(torch.float32), reason="products are torch's here, and do all rows")
def test_slots_that_nobody_asks_for_are_left_out_of_a_step() -> None:
    engine = Engine(loaded_model(), LaneTable([LANE]))
    rows = [
        Row(slot, sequence(random_prompt(slot, 9), max_tokens=7, temperature=1.0))
        for slot in (0, 2, 3)
    ]
    prefill(engine, LANE, *rows)

    decode(engine, LANE, rows[1])
    assert engine.lanes[LANE.name].logits.any(dim=1).tolist() == [False, False, True, False]
    for _ in range(5):
        decode(engine, LANE, *rows)

    for row in rows:
        tokens = row.sequence.output_token_ids
        alone = sequence(row.sequence.prompt_token_ids, max_tokens=len(tokens), temperature=1.0)
        serve(engine, [alone])
        assert tokens == alone.output_token_ids
