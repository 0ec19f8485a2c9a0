"""Logits to tokens in one Triton kernel: top-k, top-p, min-p and the draw, one program a row.

Means exactly what `sampling.draw_in_order` means after `sampling.in_order`: the same order of
tokens, the same noise, sums of integers. Its selection reads the logits twice. The first pass keeps
the largest of each of many interleaved segments: at least k tokens reach the k-th largest of these,
and hardly any others do. The second pass collects all that reach it. Should ties make them too many
to hold, the exact bound is searched bit by bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal_worker.engine.params import RowParams

MAX_TOP_K = 64
_CANDIDATES = 128
_GROUP = 16
_SEGMENTS = 2048
_NUM_WARPS = 8
_ALIGNED = 16
_ID_BITS = 20
MAX_VOCAB = 1 << _ID_BITS


@triton.jit
def _ordered(logits, ids, width, SHIFT: tl.constexpr):
    """Each token's key, an integer that compares as the logits do, and its part that tells."""
    x = tl.load(logits + ids, mask=ids < width, other=0.0).to(tl.float32)
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return key, key >> SHIFT


@triton.jit
def _count(
    logits,
    vocab,
    width,
    bound,
    below_id,
    EQUAL: tl.constexpr,
    SHIFT: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """How many tokens reach a bound, or equal it with an id under `below_id`."""
    count = tl.zeros([SEGMENTS], tl.int32)
    for start in range(0, vocab, SEGMENTS):
        ids = start + tl.arange(0, SEGMENTS)
        _, order = _ordered(logits, ids, width, SHIFT)
        if EQUAL:
            hit = (order == bound) & (ids < below_id)
        else:
            hit = order >= bound
        count += (hit & (ids < vocab)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def _collect(
    logits,
    vocab,
    width,
    scratch,
    counter,
    bound,
    last_tie,
    SHIFT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """Gather tokens over a bound, and those that equal it up to an id: how many there were."""
    tl.atomic_xchg(counter, 0)
    tl.debug_barrier()
    for start in range(0, vocab, SEGMENTS):
        ids = start + tl.arange(0, SEGMENTS)
        key, order = _ordered(logits, ids, width, SHIFT)
        taken = (order > bound) | ((order == bound) & (ids <= last_tie))
        taken = taken & (ids < vocab)
        places = counter + tl.zeros([SEGMENTS], tl.int32)
        place = tl.atomic_add(places, 1, mask=taken, sem="relaxed")
        packed = (key.to(tl.int64) << 32) | (0xFFFFFFFF - ids.to(tl.int64))
        tl.store(scratch + place, packed, mask=taken & (place < CANDIDATES))
    tl.debug_barrier()
    # An ordinary load could find an old value in the multiprocessor's own cache.
    return tl.atomic_add(counter, 0)


@triton.jit
def _exact_bound(
    logits, vocab, width, k, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr, ID_BITS: tl.constexpr
):
    """The k-th largest of all tokens, and the id of the last of its equals that belongs to k."""
    lowest: tl.constexpr = -(1 << (31 - SHIFT))
    reached = _count(logits, vocab, width, 0, 0, False, SHIFT, SEGMENTS)
    bound = tl.where(reached >= k, 0, lowest)
    bit = tl.full([], 1 << (30 - SHIFT), tl.int32)
    for _ in range(31 - SHIFT):
        reached = _count(logits, vocab, width, bound + bit, 0, False, SHIFT, SEGMENTS)
        bound = tl.where(reached >= k, bound + bit, bound)
        bit = bit >> 1
    wanted = k - _count(logits, vocab, width, bound + 1, 0, False, SHIFT, SEGMENTS)
    last_tie = tl.full([], 0, tl.int32)
    id_bit = tl.full([], 1 << (ID_BITS - 1), tl.int32)
    for _ in range(ID_BITS):
        reached = _count(logits, vocab, width, bound, last_tie + id_bit, True, SHIFT, SEGMENTS)
        last_tie = tl.where(reached < wanted, last_tie + id_bit, last_tie)
        id_bit = id_bit >> 1
    return bound, last_tie


@triton.jit
def _segment_bound(logits, vocab, width, k, SHIFT: tl.constexpr, SEGMENTS: tl.constexpr):
    """The k-th largest of the segments' maxima, which at least k tokens reach."""
    lowest: tl.constexpr = -(1 << (31 - SHIFT))
    best = tl.full([SEGMENTS], lowest, tl.int32)
    for start in range(0, vocab, SEGMENTS):
        ids = start + tl.arange(0, SEGMENTS)
        _, order = _ordered(logits, ids, width, SHIFT)
        best = tl.maximum(best, tl.where(ids < vocab, order, lowest))
    bound = tl.where(tl.sum((best >= 0).to(tl.int32)) >= k, 0, lowest)
    bit = tl.full([], 1 << (30 - SHIFT), tl.int32)
    for _ in range(31 - SHIFT):
        reached = tl.sum((best >= bound + bit).to(tl.int32))
        bound = tl.where(reached >= k, bound + bit, bound)
        bit = bit >> 1
    return bound


@triton.jit
def _mixed(bits):
    """SplitMix64's output function."""
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)


@triton.jit
def _noise(ids, seed, sample, position):
    """Standard Gumbel noise of each token, as `random.gumbel` gives it."""
    gamma = tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
    state = _mixed(seed.to(tl.uint64) + gamma)
    state = _mixed(state + (sample.to(tl.uint64) + 1) * gamma)
    state = _mixed(state + (position.to(tl.uint64) + 1) * gamma)
    bits = _mixed((ids.to(tl.uint64) + 1) * gamma + state)
    uniform = ((bits >> 12).to(tl.float64) + 0.5) * 2.220446049250313e-16
    return -tl.log(-tl.log(uniform))


@triton.jit
def _draw(
    logits,
    row_stride,
    vocab,
    width,
    scratch,
    weights,
    counters,
    temperature,
    top_k,
    top_p,
    log_min_p,
    seed,
    sample,
    positions,
    tokens,
    SHIFT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    CANDIDATES: tl.constexpr,
    GROUP: tl.constexpr,
    MAX_K: tl.constexpr,
    ID_BITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    scratch += row * CANDIDATES
    weights += row * CANDIDATES
    counter = counters + row
    k = tl.minimum(tl.load(top_k + row), MAX_K).to(tl.int32)

    bound = _segment_bound(logits, vocab, width, k, SHIFT, SEGMENTS)
    count = _collect(
        logits, vocab, width, scratch, counter, bound, vocab, SHIFT, SEGMENTS, CANDIDATES
    )
    if count > CANDIDATES:
        bound, last_tie = _exact_bound(logits, vocab, width, k, SHIFT, SEGMENTS, ID_BITS)
        count = _collect(
            logits, vocab, width, scratch, counter, bound, last_tie, SHIFT, SEGMENTS, CANDIDATES
        )

    at = tl.arange(0, CANDIDATES)
    there = at < count
    packed = tl.load(scratch + at, mask=there, other=-0x8000000000000000, cache_modifier=".cg")
    # As no two are equal, the number of earlier ones is a candidate's rank.
    rank = tl.zeros([CANDIDATES], tl.int32)
    for start in range(0, count, GROUP):
        other = start + tl.arange(0, GROUP)
        others = tl.load(
            scratch + other, mask=other < count, other=-0x8000000000000000, cache_modifier=".cg"
        )
        rank += tl.sum((others[None, :] > packed[:, None]).to(tl.int32), axis=1)
    allowed = there & (rank < k)

    ids = 0xFFFFFFFF - (packed & 0xFFFFFFFF)
    key = (packed >> 32).to(tl.int32)
    value = (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    largest = tl.max(tl.where(allowed, value, float("-inf")))
    scaled = (value - largest).to(tl.float64) / tl.load(temperature + row)
    allowed = allowed & (scaled >= tl.load(log_min_p + row))
    share = tl.load(top_p + row)
    if share < 1.0:
        # Adding and taking off a large number rounds to an integer, halves to the even one.
        weight = tl.exp(scaled) * 1099511627776.0
        weight = ((weight + 6755399441055744.0) - 6755399441055744.0).to(tl.int64)
        weight = tl.where(there & (rank < k), weight, 0)
        tl.store(weights + at, weight)
        tl.debug_barrier()
        before = tl.zeros([CANDIDATES], tl.int64)
        for start in range(0, count, GROUP):
            other = start + tl.arange(0, GROUP)
            others = tl.load(
                scratch + other, mask=other < count, other=-0x8000000000000000, cache_modifier=".cg"
            )
            their_weights = tl.load(weights + other, cache_modifier=".cg")
            earlier = others[None, :] > packed[:, None]
            before += tl.sum(tl.where(earlier, their_weights[None, :], 0), axis=1)
        allowed = allowed & (before.to(tl.float64) < tl.sum(weight).to(tl.float64) * share)

    noise = _noise(ids, tl.load(seed + row), tl.load(sample + row), tl.load(positions + row))
    score = tl.where(allowed, scaled + noise, float("-inf"))
    first = tl.max(tl.where(allowed & (score == tl.max(score)), packed, -0x8000000000000000))
    tl.store(tokens + row, 0xFFFFFFFF - (first & 0xFFFFFFFF))


def draw(logits: Tensor, params: RowParams, positions: Tensor) -> Tensor:
    """Draw a token for each row.

    Args:
        logits: `[rows, vocab]`, of any floating type; the last dimension is contiguous.
        params: of the rows; no top-k exceeds `MAX_TOP_K`, and 1 takes the likeliest token.
        positions: `[rows]`, the new token's index in its completion.

    Returns:
        `[rows]`, int64.
    """
    rows, vocab = logits.shape
    assert logits.stride(1) == 1 and vocab <= MAX_VOCAB, "one program reads one row, in order"  # noqa: PT018
    device = logits.device
    scratch = torch.empty(rows, _CANDIDATES, dtype=torch.int64, device=device)
    weights = torch.empty_like(scratch)
    counters = torch.empty(rows, dtype=torch.int32, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    _draw[(rows,)](
        logits,
        logits.stride(0),
        vocab,
        _readable_width(logits),
        scratch,
        weights,
        counters,
        params.temperature,
        params.top_k,
        params.top_p,
        params.log_min_p,
        params.seed,
        params.sample,
        positions,
        tokens,
        # The lower half of a bfloat16's bits as a float32 tells nothing.
        SHIFT=16 if logits.dtype == torch.bfloat16 else 0,
        SEGMENTS=_SEGMENTS,
        CANDIDATES=_CANDIDATES,
        GROUP=_GROUP,
        MAX_K=MAX_TOP_K,
        ID_BITS=_ID_BITS,
        num_warps=_NUM_WARPS,
    )
    return tokens


def _readable_width(logits: Tensor) -> int:
    """Elements of each row that may be read: the vocabulary, rounded up where there is padding.

    A bound that is a multiple of 16 lets the kernel read 16 bytes at once.
    """
    rows, vocab = logits.shape
    rounded = vocab + -vocab % _ALIGNED
    end = logits.storage_offset() + (rows - 1) * logits.stride(0) + rounded
    has_room = end * logits.itemsize <= logits.untyped_storage().nbytes()
    return rounded if has_room and rounded <= logits.stride(0) else vocab
