"""Sampling on plain Python numbers, one row at a time: what the engine's must agree with."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from shoal_worker.sequence import Sequence

MASK = 2**64 - 1
GAMMA = 0x9E3779B97F4A7C15


def mixed(bits: int) -> int:
    """SplitMix64's output function on Python's integers."""
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    return bits ^ (bits >> 31)


def reference_bits(seed: int, sample: int, position: int, token_id: int) -> int:
    state = mixed((seed + GAMMA) & MASK)
    for number in (sample, position, token_id):
        state = mixed((state + (number + 1) * GAMMA) & MASK)
    return state


def reference_gumbel(seed: int, sample: int, position: int, token_id: int) -> float:
    uniform = ((reference_bits(seed, sample, position, token_id) >> 12) + 0.5) * 2.0**-52
    return -math.log(-math.log(uniform))


def in_order(logits: list[float]) -> list[int]:
    """Token ids, higher logit first, then lower id."""
    return sorted(range(len(logits)), key=lambda token_id: (-logits[token_id], token_id))


def adjusted(logits: np.ndarray, sequence: Sequence) -> list[float]:
    """Logits after bias, penalties and minimum length, in float32 as the engine's."""
    sampling, output = sequence.sampling, Counter(sequence.output_token_ids)
    logits = logits.astype(np.float32)
    for token_id, bias in sampling.logit_bias.items():
        if token_id < len(logits):
            logits[token_id] += np.float32(bias)
    repetition = np.float32(sampling.repetition_penalty)
    for token_id in {*sequence.prompt_token_ids, *output}:
        logit = logits[token_id]
        logits[token_id] = logit / repetition if logit > 0 else logit * repetition
    for token_id, count in output.items():
        logits[token_id] -= np.float32(sampling.frequency_penalty) * np.float32(count)
        logits[token_id] -= np.float32(sampling.presence_penalty)
    if len(sequence.output_token_ids) < sampling.min_tokens:
        logits[list(sequence.stop_token_ids)] = -np.inf
    return [float(logit) for logit in logits]


def next_token(logits: np.ndarray, sequence: Sequence) -> int:
    """The token that a sequence draws from these logits, `[vocab]`."""
    sampling = sequence.sampling
    values = adjusted(logits, sequence)
    order = in_order(values)
    if sampling.temperature == 0:
        return order[0]
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    scaled = {i: (values[i] - values[order[0]]) / sampling.temperature for i in order}
    if sampling.top_p < 1:
        order = _within_top_p(order, scaled, sampling.top_p)
    if sampling.min_p > 0:
        order = [i for i in order if scaled[i] >= math.log(sampling.min_p)]
    if sampling.top_k <= 0 and sampling.top_p == 1:
        order = sorted(order)
    position = len(sequence.output_token_ids)
    key = sequence.seed, sequence.key.sample, position
    return max(order, key=lambda token_id: scaled[token_id] + reference_gumbel(*key, token_id))


def _within_top_p(order: list[int], scaled: dict[int, float], top_p: float) -> list[int]:
    weights = [round(math.exp(scaled[token_id]) * 2.0**40) for token_id in order]
    bound, cumulated, kept = sum(weights) * top_p, 0, []
    for token_id, weight in zip(order, weights, strict=True):
        if cumulated >= bound:
            break
        kept.append(token_id)
        cumulated += weight
    return kept
