"""What the engine's tests share: models in memory, sequences, and a loop without a queue."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from tests.tiny_models import (
    MAX_POSITIONS,
    VOCAB_SIZE,
    Kind,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)
from torch import nn

from shoal.wire import SamplingParams
from shoal_worker.engine import Engine, LoadedModel, attention
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.scheduler import Decode, Prefill, Row, Scheduler
from shoal_worker.sequence import Sequence, SequenceKey

TABLE = LaneTable([LaneSpec("bulk", 4, 64), LaneSpec("bulk", 3, MAX_POSITIONS)])

# Prompts of both lanes and several buckets, and more of them than slots.
LENGTHS = (1, 2, 17, 31, 32, 33, 50, 60, 64, 90, 5, 7)
MIXED: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_k": 5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_p": 0.7, "logit_bias": {9: 4.0}},
    {"frequency_penalty": 0.9, "min_tokens": 6},
    {"temperature": 1.2, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "presence_penalty": 0.3},
]


def loaded_model(
    kind: Kind = "gpt2", *, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: Any
) -> LoadedModel:
    """A tiny model that runs with our attention."""
    attention.register()
    model = tiny_model(tiny_config(kind, **changes), attention.ATTENTION_NAME)
    nn.Module.to(model, device, dtype)
    return LoadedModel(
        model=model,
        tokenizer=tiny_tokenizer(),
        name=kind,
        device=model.device,
        dtype=dtype,
        max_positions=MAX_POSITIONS,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=frozenset({0}),
        fingerprint="0" * 24,
    )


def sequence(
    prompt: Iterable[int], *, index: int = 0, stops: Iterable[int] = (0,), **sampling: Any
) -> Sequence:
    """A bulk sequence; greedy unless the temperature is given."""
    return Sequence(
        key=SequenceKey("job", index, 0),
        prompt_token_ids=tuple(prompt),
        sampling=SamplingParams(**{"temperature": 0.0, **sampling}),
        seed=sampling.get("seed", 1000 + index),
        service_class="bulk",
        stop_token_ids=frozenset(stops),
    )


def random_prompt(seed: int, length: int) -> tuple[int, ...]:
    """Token ids other than 0, which is padding and end."""
    draw = random.Random(seed)
    return tuple(draw.randrange(1, VOCAB_SIZE) for _ in range(length))


def sequences(lengths: tuple[int, ...] = LENGTHS, **sampling: Any) -> list[Sequence]:
    """Ragged prompts that ask for 3 to 13 new tokens each."""
    return [
        sequence(random_prompt(i, length), index=i, **{"max_tokens": 3 + (5 * i) % 11, **sampling})
        for i, length in enumerate(lengths)
    ]


def mixed_sequences() -> list[Sequence]:
    """Ragged prompts, each with parameters of its own, and log-probabilities to compare bits."""
    return [
        sequence(
            one.prompt_token_ids,
            index=i,
            **{"max_tokens": 3 + (5 * i) % 11, "logprobs": 3, **MIXED[i % len(MIXED)]},
        )
        for i, one in enumerate(sequences())
    ]


def ahead(engine: Engine, decode_steps: int) -> Engine:
    """Have an engine launch its next steps before it reads the last ones, as on a GPU."""
    engine.choices = replace(engine.choices, run_ahead=True, decode_steps=decode_steps)
    return engine


def serve(engine: Engine, sequences: Iterable[Sequence]) -> None:
    """Run sequences to their ends through a real scheduler."""
    scheduler = Scheduler(engine.table)
    for one in sequences:
        scheduler.add(one)
    while (step := scheduler.schedule()) is not None:
        tokens = engine.prefill(step) if isinstance(step, Prefill) else engine.decode(step)
        for slot in engine.take_spent(step.lane):
            scheduler.hand_over(step.lane, slot)
        slots = {sequence: sequence.slot for sequence in step.sequences}
        for ended in scheduler.update(step, tokens, now_s=0.0):
            if (slot_of_ended := slots[ended]) is not None:
                engine.release(step.lane, slot_of_ended)


def prefill(engine: Engine, lane: LaneSpec, *rows: Row) -> None:
    """Prefill rows into slots of the test's choice; each sequence takes its token."""
    longest = max(len(row.sequence.prompt_token_ids) for row in rows)
    step = Prefill(lane, lane.bucket_for(longest), rows)
    _append(rows, engine.prefill(step))


def decode(engine: Engine, lane: LaneSpec, *rows: Row, num_steps: int = 1) -> None:
    """Decode rows in slots of the test's choice; each sequence takes its tokens."""
    for _ in range(num_steps):
        _append(rows, engine.decode(Decode(lane, rows)))


def _append(rows: tuple[Row, ...], tokens: Any) -> None:
    for row, row_tokens in zip(rows, tokens, strict=True):
        for token in row_tokens:
            row.sequence.append(token)
