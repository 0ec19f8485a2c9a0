"""What each sampling parameter does, on logits made by hand; distributions against exact ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.engine import reference
from tests.engine.serving import sequence
from torch import Tensor

from shoal_worker.engine.params import RowParams
from shoal_worker.engine.sampling import (
    draw_free,
    draw_in_order,
    in_order,
    likeliest,
    log_probabilities,
    penalise,
)

NUM_DRAWS = 40_000
LOGITS = torch.tensor([1.0, 0.2, 3.0, -1.0, 2.5, 2.4, -5.0, 0.0, 1.1, 2.0])
VOCAB = len(LOGITS)


def params_of(num_rows: int, **sampling: Any) -> RowParams:
    """The same parameters in many rows, each with a seed of its own."""
    row = sequence([1], **sampling)
    params = RowParams.of([row], VOCAB, torch.device("cpu")).take(torch.zeros(num_rows).long())
    params.seed.copy_(torch.arange(num_rows))
    return params


def drawn(**sampling: float) -> Tensor:
    """Many draws from LOGITS: `[draws]`."""
    params = params_of(NUM_DRAWS, **sampling)
    logits, positions = LOGITS.expand(NUM_DRAWS, -1), torch.zeros(NUM_DRAWS).long()
    if sampling.get("top_k", 0) or sampling.get("top_p", 1.0) < 1:
        values, ids = in_order(logits, int(sampling.get("top_k", VOCAB)))
        return draw_in_order(values, ids, params, positions)
    return draw_free(logits, params, positions)


def chi_square(tokens: Tensor, expected: list[float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; impossible tokens must not occur at all."""
    counts = torch.bincount(tokens, minlength=VOCAB).tolist()
    assert all(count == 0 for count, p in zip(counts, expected, strict=True) if p == 0)
    terms = [
        (count - NUM_DRAWS * p) ** 2 / (NUM_DRAWS * p)
        for count, p in zip(counts, expected, strict=True)
        if p > 0
    ]
    return sum(terms), len(terms) - 1


def kept_softmax(temperature: float, keep: Callable[[list[float]], set[int]]) -> list[float]:
    """Exact probabilities after ruling out all but the tokens that `keep` names."""
    weights = [math.exp(logit / temperature) for logit in LOGITS.tolist()]
    kept = keep([weight / sum(weights) for weight in weights])
    total = sum(weights[token_id] for token_id in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(VOCAB)]


def smallest_set(probabilities: list[float], top_p: float) -> set[int]:
    kept: set[int] = set()
    for token_id in reference.in_order(probabilities):
        if sum(probabilities[i] for i in kept) >= top_p:
            break
        kept.add(token_id)
    return kept


EXPECTED: list[tuple[dict[str, float], list[float]]] = [
    ({"temperature": 1.0}, kept_softmax(1.0, lambda p: set(range(VOCAB)))),
    ({"temperature": 0.5}, kept_softmax(0.5, lambda p: set(range(VOCAB)))),
    ({"temperature": 3.0}, kept_softmax(3.0, lambda p: set(range(VOCAB)))),
    ({"temperature": 1.0, "top_k": 4}, kept_softmax(1.0, lambda p: {2, 4, 5, 9})),
    ({"temperature": 0.7, "top_p": 0.8}, kept_softmax(0.7, lambda p: smallest_set(p, 0.8))),
    (
        {"temperature": 1.0, "min_p": 0.3},
        kept_softmax(1.0, lambda p: {i for i in range(VOCAB) if p[i] >= 0.3 * max(p)}),
    ),
    (
        {"temperature": 1.0, "top_k": 4, "top_p": 0.6, "min_p": 0.55},
        kept_softmax(1.0, lambda p: {2, 4}),
    ),
]


@pytest.mark.parametrize(("sampling", "expected"), EXPECTED)
def test_draws_follow_the_exact_probabilities(
    sampling: dict[str, float], expected: list[float]
) -> None:
    statistic, freedom = chi_square(drawn(**sampling), expected)

    # Five standard deviations over the mean; the seeds are fixed, so this never flickers.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_draws_at_many_positions_of_one_seed_follow_the_exact_probabilities() -> None:
    params = params_of(NUM_DRAWS, temperature=1.0)
    params.seed.fill_(12345)

    tokens = draw_free(LOGITS.expand(NUM_DRAWS, -1), params, torch.arange(NUM_DRAWS))

    statistic, freedom = chi_square(tokens, kept_softmax(1.0, lambda p: set(range(VOCAB))))
    assert statistic < freedom + 5 * math.sqrt(2 * freedom)


def test_top_p_keeps_the_token_that_crosses_the_bound_and_no_more() -> None:
    values, ids = in_order(torch.zeros(200, 10), 10)
    params = RowParams.of([sequence([1], temperature=1.0, top_p=0.5)] * 200, 10, values.device)
    params.seed.copy_(torch.arange(200))

    tokens = draw_in_order(values, ids, params, torch.zeros(200).long())

    # Ten equal tokens: five of them hold exactly half.
    assert set(tokens.tolist()) == {0, 1, 2, 3, 4}


def test_order_is_higher_logit_first_then_lower_token_id() -> None:
    draw = torch.Generator().manual_seed(0)
    # Few distinct values, zeros of both signs, many ties at every k.
    logits = torch.randint(-3, 4, (20, 300), generator=draw).float() * 0.5
    logits[:, ::7] *= -1.0

    for k in (1, 2, 50, 299, 300):
        values, ids = in_order(logits, k)
        for row in range(20):
            expected = reference.in_order(logits[row].tolist())[:k]
            assert ids[row].tolist() == expected
            assert torch.equal(values[row], logits[row, expected])


def test_order_holds_for_infinities_and_the_smallest_numbers() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1e-45, -1e-45, -0.0, 3e38, -3e38, torch.inf]])

    _, ids = in_order(logits, 7)

    assert ids[0].tolist() == [7, 5, 2, 0, 4, 3, 6]


def test_the_likeliest_of_equals_has_the_lowest_token_id() -> None:
    logits = torch.zeros(64, 50_257)
    logits[:, 50_000:] = 1.0
    logits[:, 777] = 1.0

    assert likeliest(logits).tolist() == [777] * 64
    assert likeliest(logits.to(torch.bfloat16)).tolist() == [777] * 64


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-3])
@pytest.mark.parametrize("limits", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_tiny_temperature_takes_the_likeliest_token(
    temperature: float, limits: dict[str, float]
) -> None:
    assert set(drawn(temperature=temperature, **limits).tolist()) == {2}


def test_min_p_of_one_leaves_only_equals_of_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 5.0, 5.0, 4.999]]).expand(100, -1)
    params = RowParams.of([sequence([1], temperature=1.0, min_p=1.0)] * 100, 4, logits.device)
    params.seed.copy_(torch.arange(100))

    tokens = draw_free(logits, params, torch.zeros(100).long())

    assert set(tokens.tolist()) == {1, 2}


def test_penalties_follow_vllm() -> None:
    logits = torch.tensor([[2.0, -2.0, 2.0, -2.0, 2.0]])
    in_prompt = torch.tensor([[True, True, False, False, False]])
    counts = torch.tensor([[0, 0, 3, 1, 0]])
    penalties = torch.tensor([[2.0, 0.5, 0.25]])

    penalised = penalise(logits, in_prompt, counts, penalties)

    # Prompt tokens: repetition only. Generated: repetition, then 0.25 each time and 0.5 once.
    assert penalised.tolist() == [[1.0, -4.0, 1.0 - 0.75 - 0.5, -4.0 - 0.25 - 0.5, 2.0]]


def test_neutral_penalties_change_no_bit() -> None:
    logits = torch.randn(4, 100, generator=torch.Generator().manual_seed(0))
    everywhere = torch.ones(4, 100, dtype=torch.bool)
    neutral = torch.tensor([[1.0, 0.0, 0.0]] * 4)

    assert torch.equal(penalise(logits, everywhere, everywhere.int() * 9, neutral), logits)


def test_log_probabilities_are_natural_logarithms_of_the_model_s_own_distribution() -> None:
    logits = LOGITS[None]

    chosen, top, ids = log_probabilities(logits, torch.tensor([7]), 3)

    total = math.log(sum(math.exp(logit) for logit in LOGITS.tolist()))
    assert ids.tolist() == [[2, 4, 5]]
    assert chosen.tolist() == pytest.approx([0.0 - total], abs=1e-6)
    assert top[0].tolist() == pytest.approx([3.0 - total, 2.5 - total, 2.4 - total], abs=1e-6)
