"""Sampling parameters of many rows as tensors, one entry a row.

Owns their types and the translation from a sequence's parameters. Knows no logits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from shoal.wire import SamplingParams
from shoal_worker.engine.transfer import to_device
from shoal_worker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class RowParams:
    """How each row draws: tensors of `[rows]`.

    Attributes:
        temperature: float64, over 0 for all rows but greedy ones.
        top_k: int64, the size of the vocabulary where it is unlimited, 1 for greedy rows.
        top_p: float64.
        log_min_p: float64, the logarithm of min_p, so -inf for 0.
        seed: int64.
        sample: int64.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    log_min_p: Tensor
    seed: Tensor
    sample: Tensor

    @classmethod
    def of(cls, sequences: list[Sequence], vocab_size: int, device: torch.device) -> RowParams:
        """The parameters of these sequences, a row each."""
        sampling = [sequence.sampling for sequence in sequences]

        def floats(values: Iterable[float]) -> Tensor:
            return to_device(list(values), torch.float64, device)

        def integers(values: Iterable[int]) -> Tensor:
            return to_device(list(values), torch.int64, device)

        return cls(
            temperature=floats(s.temperature or 1.0 for s in sampling),
            top_k=integers(_top_k(s, vocab_size) for s in sampling),
            top_p=floats(s.top_p for s in sampling),
            log_min_p=floats(math.log(s.min_p) if s.min_p else -math.inf for s in sampling),
            seed=integers(sequence.seed for sequence in sequences),
            sample=integers(sequence.key.sample for sequence in sequences),
        )

    @classmethod
    def empty(cls, num_rows: int, device: torch.device) -> RowParams:
        """Room for so many rows."""
        floats = torch.zeros(3, num_rows, dtype=torch.float64, device=device)
        integers = torch.zeros(3, num_rows, dtype=torch.int64, device=device)
        return cls(
            temperature=floats[0],
            top_p=floats[1],
            log_min_p=floats[2],
            top_k=integers[0],
            seed=integers[1],
            sample=integers[2],
        )

    def take(self, rows: Tensor) -> RowParams:
        """The parameters of some rows: `rows` is `[n]`, indices."""
        return RowParams(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Tensor, params: RowParams) -> None:
        """Write the parameters of some rows: `rows` is `[n]`, indices."""
        for field in fields(self):
            getattr(self, field.name)[rows] = getattr(params, field.name)


def _top_k(sampling: SamplingParams, vocab_size: int) -> int:
    if sampling.temperature == 0:
        return 1
    return sampling.top_k if sampling.top_k > 0 else vocab_size
