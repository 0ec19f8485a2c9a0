"""Rows of every kind side by side: each draws what it would alone, and what the reference says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine import reference
from tests.engine.serving import sequence

from shoal.wire import SamplingParams
from shoal_worker.engine.slots import SlotSampling
from shoal_worker.sequence import SampledToken, Sequence, SequenceKey

VOCAB = 61
NUM_SLOTS = 8
CPU = torch.device("cpu")

sampling_params: st.SearchStrategy[dict[str, Any]] = st.fixed_dictionaries(
    {
        "max_tokens": st.just(50),
        "min_tokens": st.sampled_from([0, 0, 2, 5]),
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([-1, 0, 1, 2, 5, 20, VOCAB - 1, VOCAB, 1000]),
        "top_p": st.sampled_from([1.0, 1.0, 0.95, 0.5, 0.01]),
        "min_p": st.sampled_from([0.0, 0.0, 0.05, 0.6]),
        "repetition_penalty": st.sampled_from([1.0, 1.0, 1.3, 0.8]),
        "presence_penalty": st.sampled_from([0.0, 0.0, 0.7, -0.5]),
        "frequency_penalty": st.sampled_from([0.0, 0.0, 0.4, -0.2]),
        "logprobs": st.sampled_from([None, None, 0, 3, 20]),
        "logit_bias": st.sampled_from([{}, {}, {3: 5.0, 60: -100.0}, {VOCAB: 100.0, 7: 0.25}]),
    }
)


@st.composite
def rows(draw: st.DrawFn) -> Sequence:
    """A sequence of any kind."""
    token_ids = st.integers(0, VOCAB - 1)
    return Sequence(
        key=SequenceKey("job", 0, draw(st.integers(0, 3))),
        prompt_token_ids=tuple(draw(st.lists(token_ids, min_size=1, max_size=6))),
        sampling=SamplingParams(**draw(sampling_params)),
        seed=draw(st.integers(0, 2**63 - 1)),
        stop_token_ids=frozenset(draw(st.lists(token_ids, max_size=3))),
    )


def logits_of(seed: int, num_steps: int) -> torch.Tensor:
    """`[steps, slots, vocab]`, with many ties, as bfloat16 has them."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(num_steps, NUM_SLOTS, VOCAB, generator=draw).mul(8).round().div(4)


def run(sequences: dict[int, Sequence], logits: torch.Tensor) -> list[list[SampledToken]]:
    """Draw from the same logits step after step: for each step one token a sequence."""
    sampling = SlotSampling(NUM_SLOTS, VOCAB, CPU)
    slots = list(sequences)
    sampling.enter(slots, list(sequences.values()))
    steps = []
    for step_logits in logits:
        drawn = sampling.draw(step_logits[slots], sampling.plan(tuple(slots))).to_host()
        steps.append(drawn)
        for slot, token in zip(slots, drawn, strict=True):
            sequences[slot].output_token_ids.append(token.token_id)
    return steps


def fresh(one: Sequence) -> Sequence:
    return Sequence(
        one.key, one.prompt_token_ids, one.sampling, one.seed, "bulk", one.stop_token_ids
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), min_size=1, max_size=NUM_SLOTS), st.integers(0, 1000))
def test_any_mixture_draws_what_the_reference_draws(sequences: list[Sequence], seed: int) -> None:
    logits = logits_of(seed, num_steps=3)
    steps = run(dict(enumerate(sequences)), logits.clone())

    for slot, one in enumerate(sequences):
        replayed = fresh(one)
        for step, step_logits in zip(steps, logits, strict=True):
            expected = reference.next_token(step_logits[slot].numpy(), replayed)
            assert step[slot].token_id == expected
            replayed.output_token_ids.append(expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(rows(), min_size=2, max_size=NUM_SLOTS), st.integers(0, 1000))
def test_company_changes_neither_tokens_nor_a_bit_of_log_probabilities(
    sequences: list[Sequence], seed: int
) -> None:
    logits = logits_of(seed, num_steps=2)
    together = run(dict(enumerate(map(fresh, sequences))), logits.clone())

    for slot, one in enumerate(sequences):
        alone = run({slot: fresh(one)}, logits.clone())
        assert [step[0] for step in alone] == [step[slot] for step in together]


def test_a_refilled_slot_remembers_nothing_of_its_last_sequence() -> None:
    penalised: dict[str, Any] = {"repetition_penalty": 1.5, "frequency_penalty": 1.0}
    first = sequence([1, 2, 3], max_tokens=20, logprobs=2, logit_bias={5: 9.0}, **penalised)
    logits = logits_of(3, num_steps=4)
    sampling = SlotSampling(NUM_SLOTS, VOCAB, CPU)
    sampling.enter([2], [first])
    for step_logits in logits:
        sampling.draw(step_logits[[2]].clone(), sampling.plan((2,)))

    second = sequence([7, 8], max_tokens=20, **penalised)
    sampling.enter([2], [second])
    again = [sampling.draw(one[[2]].clone(), sampling.plan((2,))).to_host()[0] for one in logits]

    assert again == [step[0] for step in run({2: fresh(second)}, logits)]


@pytest.mark.parametrize("stop", [0, 60])
def test_no_stop_token_comes_before_the_minimum_length(stop: int) -> None:
    logits = torch.zeros(6, NUM_SLOTS, VOCAB)
    logits[:, :, stop] = 50.0

    steps = run({0: sequence([1], stops=[stop], min_tokens=4, max_tokens=6)}, logits)

    tokens = [step[0].token_id for step in steps]
    assert stop not in tokens[:4]
    assert tokens[4:] == [stop, stop]


def test_log_probabilities_come_only_for_rows_that_ask_and_as_many_as_they_ask() -> None:
    asked = {0: sequence([1], logprobs=2), 1: sequence([1]), 2: sequence([1], logprobs=0)}

    (step,) = run(asked, logits_of(1, num_steps=1))

    num_reported = [None if t.logprobs is None else len(t.logprobs.top) for t in step]
    assert num_reported == [2, None, 0]


def test_log_probabilities_are_those_before_bias_and_penalties() -> None:
    logits = logits_of(2, num_steps=1)
    biased = sequence([1], logprobs=1, logit_bias={9: 100.0}, repetition_penalty=2.0)

    (step,) = run({0: biased}, logits.clone())

    expected = torch.log_softmax(logits[0, 0], dim=-1)
    assert step[0].token_id == 9
    assert step[0].logprobs is not None
    assert step[0].logprobs.chosen == expected[9].item()
    assert step[0].logprobs.top[0][1] == expected.max().item()
