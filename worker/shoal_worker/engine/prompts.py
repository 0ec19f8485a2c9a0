"""A prefill's inputs as one tensor that stays where it is, so that the pass can be recorded."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor

from shoal_worker.engine.cache import PromptWrite
from shoal_worker.engine.transfer import to_device
from shoal_worker.lanes import Bucket
from shoal_worker.sequence import Sequence

_PER_ROW = 5


class PromptInputs:
    """What one bucket reads.

    A row that is not in use reads one token 0 and writes what the first row writes.

    Attributes:
        token_ids: `[rows, length]`, padded on the right.
        lengths: `[rows]`, of the prompts.
        slots: `[rows]`, where each row's result goes.
        source: `[rows]`, the computed row that goes there.
        limits: `[rows]`, the last position of the sequence in that slot.
        drawn_inside: `[rows]`, 1 where the pass itself draws the first token.
    """

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self.bucket = bucket
        self._device = device
        size = bucket.rows * (bucket.length + _PER_ROW)
        self._packed = torch.zeros(size, dtype=torch.int64, device=device)
        ids = bucket.rows * bucket.length
        self.token_ids = self._packed[:ids].view(bucket.rows, bucket.length)
        rest = self._packed[ids:].view(_PER_ROW, bucket.rows)
        self.lengths, self.slots, self.source, self.limits, self.drawn_inside = rest.unbind()

    def fill(self, slots: list[int], sequences: list[Sequence], inside: frozenset[int]) -> None:
        """Send the next prompts.

        Args:
            slots: a slot for each sequence, at most as many as the bucket has rows.
            sequences: whose prompts to read.
            inside: the slots whose first token the pass itself draws.
        """
        unused = self.bucket.rows - len(slots)
        prompts = [sequence.prompt_token_ids for sequence in sequences] + [(0,)] * unused
        padding = [0] * self.bucket.length
        padded = chain.from_iterable((*p, *padding[len(p) :]) for p in prompts)
        all_slots = [*slots, *slots[:1] * unused]
        limits = [sequence.num_positions - 1 for sequence in sequences]
        packed = [
            *padded,
            *map(len, prompts),
            *all_slots,
            *range(len(slots)),
            *[0] * unused,
            *limits,
            *limits[:1] * unused,
            *[int(slot in inside) for slot in all_slots],
        ]
        self._packed.copy_(to_device(packed, torch.int64, self._device))

    def position_ids(self) -> Tensor:
        """`[rows, length]`."""
        return torch.arange(self.bucket.length, device=self._device).expand_as(self.token_ids)

    def write(self) -> PromptWrite:
        """Where keys and values go."""
        padding = self.position_ids() >= self.lengths[:, None]
        return PromptWrite(self.slots, self.source, self.lengths, padding[:, None, :, None])
