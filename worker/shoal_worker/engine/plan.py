"""Who draws how: from the sampling parameters of a step's sequences to index tensors.

Owns the sorting of rows into groups that are drawn alike, and what comes back from a draw. Knows
neither logits nor the model; `slots` keeps the state and `sampling` does the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Row
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from shoal.wire import SamplingParams
from shoal_worker.engine.params import RowParams
from shoal_worker.engine.sampling import Groups
from shoal_worker.engine.transfer import ToHost, to_device
from shoal_worker.sequence import SampledToken, Sequence, TokenLogprobs

Kind = Literal["greedy", "free", "limited", "ordered"]


@dataclass(frozen=True, slots=True)
class Traits:
    """What a plan needs to know of one sequence.

    Attributes:
        bias: token ids and what is added to their logits.
        bans: tokens that it may not draw before `min_tokens` were generated.
        num_logprobs: likeliest tokens to report; None reports nothing.
    """

    kind: Kind
    top_k: int
    penalised: bool
    bias: tuple[tuple[int, float], ...]
    bans: tuple[int, ...]
    min_tokens: int
    num_logprobs: int | None

    def is_plain(self, max_top_k: int) -> bool:
        """Whether it takes the likeliest token or draws of so many, and asks for nothing else."""
        if self.penalised or self.bias or self.bans or self.num_logprobs is not None:
            return False
        return self.kind == "greedy" or (self.kind == "limited" and self.top_k <= max_top_k)

    @classmethod
    def of(cls, sequence: Sequence, vocab_size: int) -> Traits:
        """A sequence's. Token ids past the vocabulary have no logit to change."""
        sampling = sequence.sampling
        stops = sequence.stop_token_ids if sampling.min_tokens else ()
        return cls(
            kind=_kind(sampling, vocab_size),
            top_k=sampling.top_k,
            penalised=penalties_of(sampling) != (1.0, 0.0, 0.0),
            bias=tuple((i, b) for i, b in sampling.logit_bias.items() if i < vocab_size),
            bans=tuple(token_id for token_id in stops if token_id < vocab_size),
            min_tokens=sampling.min_tokens,
            num_logprobs=sampling.logprobs,
        )


def penalties_of(sampling: SamplingParams) -> tuple[float, float, float]:
    """Repetition, presence and frequency penalty, in this order everywhere."""
    return sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty


def _kind(sampling: SamplingParams, vocab_size: int) -> Kind:
    if sampling.temperature == 0:
        return "greedy"
    if 0 < sampling.top_k < vocab_size:
        return "limited"
    return "ordered" if sampling.top_p < 1 else "free"


@dataclass(frozen=True, slots=True)
class Bias:
    """What to add to single logits: `[n]` each, no (row, id) twice."""

    rows: Tensor
    ids: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True)
class Bans:
    """Tokens ruled out until a row has generated so many: `[n]` each, no (row, id) twice."""

    rows: Tensor
    ids: Tensor
    until: Tensor


@dataclass(frozen=True, slots=True)
class Plan:
    """How the rows of a step draw their tokens.

    Attributes:
        slots: `[rows]`, the slot of each row.
        penalised: rows with any penalty, as indices; None where there is none.
        logprobs: rows that report log-probabilities, likewise.
        num_logprobs: for each of all rows, how many likeliest tokens it reports.
    """

    slots: Tensor
    params: RowParams
    groups: Groups
    bias: Bias | None
    bans: Bans | None
    penalised: Tensor | None
    logprobs: Tensor | None
    num_logprobs: tuple[int | None, ...]

    @property
    def max_logprobs(self) -> int:
        """The most likeliest tokens that any row reports."""
        return max((number for number in self.num_logprobs if number is not None), default=0)


def make_plan(slots: tuple[int, ...], traits: Row[Traits], params: RowParams) -> Plan:
    """The plan of rows in these slots, with `params` being those of all slots."""
    device = params.seed.device
    index = to_device(slots, torch.int64, device)

    def rows_where(matches: Callable[[Traits], bool]) -> Tensor | None:
        rows = [row for row, row_traits in enumerate(traits) if matches(row_traits)]
        return to_device(rows, torch.int64, device) if rows else None

    groups = Groups(
        greedy=rows_where(lambda t: t.kind == "greedy"),
        free=rows_where(lambda t: t.kind == "free"),
        limited=rows_where(lambda t: t.kind == "limited"),
        ordered=rows_where(lambda t: t.kind == "ordered"),
        max_top_k=max((t.top_k for t in traits if t.kind == "limited"), default=0),
    )
    return Plan(
        slots=index,
        params=params.take(index),
        groups=groups,
        bias=_bias(traits, device),
        bans=_bans(traits, device),
        penalised=rows_where(lambda t: t.penalised),
        logprobs=rows_where(lambda t: t.num_logprobs is not None),
        num_logprobs=tuple(t.num_logprobs for t in traits),
    )


def _bias(traits: Row[Traits], device: torch.device) -> Bias | None:
    entries = [(row, *entry) for row, t in enumerate(traits) for entry in t.bias]
    if not entries:
        return None
    rows, ids, values = zip(*entries, strict=True)
    return Bias(
        to_device(rows, torch.int64, device),
        to_device(ids, torch.int64, device),
        to_device(values, torch.float32, device),
    )


def _bans(traits: Row[Traits], device: torch.device) -> Bans | None:
    entries = [(row, ban, t.min_tokens) for row, t in enumerate(traits) for ban in t.bans]
    if not entries:
        return None
    rows, ids, until = zip(*entries, strict=True)
    return Bans(
        to_device(rows, torch.int64, device),
        to_device(ids, torch.int64, device),
        to_device(until, torch.int64, device),
    )


@dataclass(frozen=True, slots=True)
class Drawn:
    """The outcome of one step, still on the device.

    Attributes:
        plan: that it followed.
        tokens: `[rows]`.
        logprobs: of the rows that report them, as `sampling.log_probabilities` gives them.
    """

    plan: Plan
    tokens: Tensor
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None

    def to_host(self) -> list[SampledToken]:
        """One token for each row, in order; waits for the device."""
        token_ids: list[int] = self.tokens.tolist()
        reports = self.reports()
        found = {} if reports is None else reports.get()
        return [SampledToken(token_id, found.get(row)) for row, token_id in enumerate(token_ids)]

    def reports(self) -> Reports | None:
        """The log-probabilities on their way to the host, if any row reports them."""
        return None if self.logprobs is None else Reports(self.plan, self.logprobs)


class Reports:
    """Log-probabilities of one step, on their way to the host."""

    def __init__(self, plan: Plan, logprobs: tuple[Tensor, Tensor, Tensor]) -> None:
        self._num_logprobs = plan.num_logprobs
        self._tensors = [ToHost(tensor) for tensor in logprobs]

    def get(self) -> dict[int, TokenLogprobs]:
        """Those of each reporting row of the plan, by the row's place in it."""
        reports = {}
        rows = [row for row, number in enumerate(self._num_logprobs) if number is not None]
        chosen, top, ids = (tensor.get().tolist() for tensor in self._tensors)
        for place, row in enumerate(rows):
            number = self._num_logprobs[row]
            pairs = zip(ids[place][:number], top[place][:number], strict=True)
            reports[row] = TokenLogprobs(chosen[place], tuple(pairs))
        return reports
