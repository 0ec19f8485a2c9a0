"""From logits to tokens: the sampling of many rows at once, as functions over tensors.

Owns the meaning of every sampling parameter and the one order of tokens: higher logit first, then
lower token id. Knows neither slots nor sequences. A row's token follows from its own logits and
parameters; sums that decide something are of integers, so that they don't depend on how many
candidates its neighbours asked for.

The order of work follows vLLM's names and meanings: bias, penalties, minimum length, temperature,
top-k, top-p, min-p, draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from shoal_worker.engine.params import RowParams
from shoal_worker.engine.random import gumbel, row_keys

# Probabilities as integers of this size: their sum over a vocabulary stays within 63 bits.
_WEIGHT_ONE = 2.0**40
# Logits whose addresses are a multiple of 64 bytes apart.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows draw how, each as row indices; None where no row does.

    Attributes:
        greedy: rows that take the likeliest token.
        free: rows that may draw any token, subject to min-p.
        limited: rows with a top-k, and `max_top_k` is the largest of those.
        ordered: rows with a top-p and no top-k, which need all tokens in order.
    """

    greedy: Tensor | None = None
    free: Tensor | None = None
    limited: Tensor | None = None
    ordered: Tensor | None = None
    max_top_k: int = 0


def sample(logits: Tensor, params: RowParams, positions: Tensor, groups: Groups) -> Tensor:
    """One token for each row.

    Args:
        logits: `[rows, vocab]`, float32, after bias and penalties.
        params: of the rows.
        positions: `[rows]`, the new token's index in its completion.
        groups: every row in exactly one.

    Returns:
        `[rows]`, int64.
    """
    tokens = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    if (rows := groups.greedy) is not None:
        tokens[rows] = likeliest(logits[rows])
    if (rows := groups.free) is not None:
        tokens[rows] = draw_free(logits[rows], params.take(rows), positions[rows])
    if (rows := groups.limited) is not None:
        values, ids = in_order(logits[rows], groups.max_top_k)
        tokens[rows] = draw_in_order(values, ids, params.take(rows), positions[rows])
    if (rows := groups.ordered) is not None:
        values, ids = in_order(logits[rows], logits.shape[1])
        tokens[rows] = draw_in_order(values, ids, params.take(rows), positions[rows])
    return tokens


def likeliest(logits: Tensor) -> Tensor:
    """The first token in order: `[rows, vocab]` to `[rows]`."""
    # torch documents that of equal maxima the first is taken.
    return logits.argmax(dim=-1)


def draw_free(logits: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """Draw from the whole vocabulary less what min-p rules out, without sorting.

    Args:
        logits: `[rows, vocab]`, float32.
        params: of the rows; top-k and top-p are not looked at.
        positions: `[rows]`.

    Returns:
        `[rows]`.
    """
    scaled = _scaled(logits, logits.amax(dim=-1, keepdim=True), params)
    keys = row_keys(params.seed, params.sample, positions)
    noise = gumbel(keys, torch.arange(logits.shape[1], device=logits.device))
    allowed = scaled >= params.log_min_p[:, None]
    return noise.add_(scaled).masked_fill_(~allowed, -torch.inf).argmax(dim=-1)


def draw_in_order(values: Tensor, ids: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """Draw from candidates in order, less what top-k, top-p and min-p rule out.

    Args:
        values: `[rows, candidates]`, logits in order, float32.
        ids: `[rows, candidates]`, their token ids.
        params: of the rows; no top-k exceeds the number of candidates.
        positions: `[rows]`.

    Returns:
        `[rows]`.
    """
    scaled = _scaled(values, values[:, :1], params)
    rank = torch.arange(values.shape[1], device=values.device)
    allowed = rank < params.top_k[:, None]
    allowed &= _within_top_p(scaled.masked_fill(~allowed, -torch.inf), params.top_p)
    allowed &= scaled >= params.log_min_p[:, None]
    noise = gumbel(row_keys(params.seed, params.sample, positions), ids)
    chosen = noise.add_(scaled).masked_fill_(~allowed, -torch.inf).argmax(dim=-1, keepdim=True)
    return ids.gather(1, chosen)[:, 0]


def in_order(logits: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """The first tokens in order: higher logit, then lower token id.

    Args:
        logits: `[rows, vocab]`, float32.
        num_tokens: how many, up to all.

    Returns:
        Their logits and their ids, `[rows, num_tokens]` each.
    """
    if num_tokens >= logits.shape[1]:
        values, ids = logits.sort(dim=-1, descending=True, stable=True)
        return values, ids
    # torch.topk orders equal values as it likes, so we give it keys of which no two are equal.
    ids = _order_keys(logits).topk(num_tokens, dim=-1).values.bitwise_and_(0xFFFFFFFF)
    ids.neg_().add_(0xFFFFFFFF)
    return logits.gather(1, ids), ids


def _order_keys(logits: Tensor) -> Tensor:
    """Integers that compare as the logits do, then as the negated token ids: `[rows, vocab]`."""
    # Adding 0 makes -0 a 0. The bits of floats compare as integers do once the rest of a negative
    # number's bits are flipped.
    bits = (logits + 0.0).view(torch.int32)
    bits = bits ^ (bits >> 31).bitwise_and_(0x7FFFFFFF)
    ids = torch.arange(logits.shape[1], device=logits.device)
    return bits.to(torch.int64).mul_(1 << 32).add_(0xFFFFFFFF - ids)


def _scaled(logits: Tensor, maximum: Tensor, params: RowParams) -> Tensor:
    """Log-weights relative to the likeliest token's, after temperature: float64, at most 0."""
    # The maximum goes first: dividing by a tiny temperature may then overflow to -inf only.
    return (logits - maximum).to(torch.float64).div_(params.temperature[:, None])


def _within_top_p(scaled: Tensor, top_p: Tensor) -> Tensor:
    """Which candidates belong to the smallest set that holds top_p of the probability.

    Args:
        scaled: `[rows, candidates]`, log-weights in order, -inf for those ruled out before.
        top_p: `[rows]`.

    Returns:
        `[rows, candidates]`, boolean.
    """
    weights = scaled.exp().mul_(_WEIGHT_ONE).round_().to(torch.int64)
    cumulated = weights.cumsum(dim=-1)
    total = cumulated[:, -1:]
    # With top_p 1 the bound is the total itself and would cut off weights that rounded to 0.
    bound = torch.where(top_p[:, None] < 1, total * top_p[:, None], torch.inf)
    return cumulated - weights < bound


def penalise(
    logits: Tensor,
    in_prompt: Tensor,
    output_counts: Tensor,
    penalties: Tensor,
) -> Tensor:
    """Lower the logits of tokens that were there before, as vLLM does.

    Args:
        logits: `[rows, vocab]`, float32.
        in_prompt: `[rows, vocab]`, whether the prompt holds the token.
        output_counts: `[rows, vocab]`, how often the completion holds it.
        penalties: `[rows, 3]`: repetition divides positive logits and multiplies others, prompt
            tokens included; presence is taken off once; frequency is taken off each time.

    Returns:
        `[rows, vocab]`.
    """
    repetition, presence, frequency = penalties[:, :, None].unbind(dim=1)
    generated = output_counts > 0
    penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
    logits = torch.where(in_prompt | generated, penalised, logits)
    return logits - frequency * output_counts - presence * generated


def log_probabilities(
    logits: Tensor, tokens: Tensor, num_top: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Natural log-probabilities under the model's own distribution.

    Args:
        logits: `[rows, vocab]`, as the model gave them, float32.
        tokens: `[rows]`, the chosen ones.
        num_top: how many of the likeliest to give as well.

    Returns:
        The chosen tokens', `[rows]`; the likeliest tokens' and their ids, `[rows, num_top]` each.
    """
    logs = _log_softmax(logits)
    chosen = logs.gather(1, tokens[:, None])[:, 0]
    _, ids = in_order(logits, num_top)
    return chosen, logs.gather(1, ids), ids


def _log_softmax(logits: Tensor) -> Tensor:
    """Of rows that all begin at an aligned address, since CUDA sums in another order elsewhere."""
    vocab_size = logits.shape[1]
    padded = pad(logits, (0, -vocab_size % _ALIGNED), value=-torch.inf)
    return padded.log_softmax(dim=-1)[:, :vocab_size]
