"""An engine that launches steps before it reads the last ones, as on a GPU, run on the CPU."""

from __future__ import annotations

import pytest
from tests.engine.serving import (
    TABLE,
    ahead,
    loaded_model,
    mixed_sequences,
    sequences,
    serve,
)
from tests.engine.test_engine import generated_alone
from tests.tiny_models import Kind, tiny_config, tiny_model

from shoal_worker.engine import Engine


@pytest.mark.parametrize("decode_steps", [1, 4])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_slots_refilled_behind_their_last_tokens_give_generate_s_greedy_tokens(
    kind: Kind, decode_steps: int
) -> None:
    served = sequences()

    serve(ahead(Engine(loaded_model(kind), TABLE), decode_steps), served)

    model = tiny_model(tiny_config(kind))
    for one in served:
        assert one.output_token_ids == generated_alone(model, one)


@pytest.mark.parametrize("decode_steps", [1, 3])
def test_every_kind_of_row_draws_what_it_draws_when_read_at_once(decode_steps: int) -> None:
    at_once, late = mixed_sequences(), mixed_sequences()

    serve(Engine(loaded_model("gpt2"), TABLE), at_once)
    serve(ahead(Engine(loaded_model("gpt2"), TABLE), decode_steps), late)

    for one, other in zip(at_once, late, strict=True):
        assert one.output_token_ids == other.output_token_ids
        assert one.output_logprobs == other.output_logprobs


def test_nothing_is_kept_of_a_sequence_that_has_ended() -> None:
    engine = ahead(Engine(loaded_model("gpt2"), TABLE), 2)

    serve(engine, sequences())

    for lane in engine.lanes.values():
        assert not lane._launched._unread
        assert not lane._launched._launched
        assert lane._occupants == [None] * lane.spec.slots
