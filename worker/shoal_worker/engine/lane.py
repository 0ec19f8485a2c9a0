"""One lane at work: its cache, its slots, and the two forward passes over them.

Owns the tensors that say where each slot stands, on the device, so that a step reads nothing back
to know where the next one goes. Knows no scheduler and no clock.
"""

from __future__ import annotations

from collections.abc import Sequence as Layers

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal_worker.engine.cache import LaneCache, LayerShape, PromptWrite, TokenWrite
from shoal_worker.engine.forward import next_logits, prompt_logits
from shoal_worker.engine.plan import Drawn
from shoal_worker.engine.slots import SlotSampling
from shoal_worker.lanes import Bucket, LaneSpec
from shoal_worker.sequence import Sequence


class Lane:
    """A lane's slots, each idle or with the one sequence that was prefilled into it last.

    Args:
        model: runs with our attention.
        spec: the lane's shape.
        shapes: what each layer of the model keeps for a token.
        vocab_size: logits of a row.
    """

    def __init__(
        self, model: PreTrainedModel, spec: LaneSpec, shapes: Layers[LayerShape], vocab_size: int
    ) -> None:
        self.spec = spec
        self._model = model
        self._device = model.device
        self.cache = LaneCache(shapes, spec.slots, spec.kv_len, self._device)
        self._sampling = SlotSampling(spec.slots, vocab_size, self._device)
        # What each slot reads next, and where: the newest token and its position.
        self._tokens = torch.zeros(spec.slots, dtype=torch.int64, device=self._device)
        self._positions = torch.zeros(spec.slots, dtype=torch.int64, device=self._device)
        self._occupants: list[Sequence | None] = [None] * spec.slots
        # Positions of each slot that may hold something other than zero.
        self._extents = [0] * spec.slots

    @staticmethod
    def bytes_needed(spec: LaneSpec, shapes: Layers[LayerShape], vocab_size: int) -> int:
        """Memory that a lane of this shape takes for itself."""
        kv_bytes = spec.kv_len * sum(shape.bytes_per_token for shape in shapes)
        return spec.slots * (kv_bytes + SlotSampling.bytes_per_slot(vocab_size))

    def prefill(self, bucket: Bucket, slots: list[int], sequences: list[Sequence]) -> Drawn:
        """Read prompts into slots and draw each one's first token.

        Args:
            bucket: the shape to run at.
            slots: a slot for each sequence; whoever was there is gone.
            sequences: at most as many as the bucket has rows.
        """
        self._enter(bucket, slots, sequences)
        logits = self._forward_prompts(bucket, slots, sequences)
        drawn = self._sampling.draw(logits[: len(slots)], self._sampling.plan(tuple(slots)))
        index = torch.tensor(slots, device=self._device)
        lengths = [len(sequence.prompt_token_ids) for sequence in sequences]
        self._tokens[index] = drawn.tokens
        self._positions[index] = torch.tensor(lengths, device=self._device)
        return drawn

    def decode(self, slots: list[int], sequences: list[Sequence]) -> Drawn:
        """Draw the next token of the sequences in these slots; all other slots stay as they are.

        Args:
            slots: a slot for each sequence.
            sequences: as they were prefilled.
        """
        for slot, sequence in zip(slots, sequences, strict=True):
            assert self._occupants[slot] is sequence, f"slot {slot} holds another sequence"
        plan = self._sampling.plan(tuple(slots))
        logits = self._forward_tokens()
        # A slot that is not asked for wrote its newest token where it will write it again.
        drawn = self._sampling.draw(logits[plan.slots], plan)
        self._tokens[plan.slots] = drawn.tokens
        self._positions[plan.slots] += 1
        return drawn

    def release(self, slot: int) -> None:
        """Leave a slot idle: it goes on being computed, at its first position, for nobody."""
        self._occupants[slot] = None
        self._sampling.leave(slot)
        self._positions[slot] = 0

    def _enter(self, bucket: Bucket, slots: list[int], sequences: list[Sequence]) -> None:
        assert 1 <= len(slots) <= bucket.rows, f"{len(slots)} rows for a bucket of {bucket.rows}"
        extent = max(self._extents[slot] for slot in slots)
        if extent > bucket.length:
            index = torch.tensor(slots, device=self._device)
            self.cache.clear(index, bucket.length, extent)
        self._sampling.enter(slots, sequences)
        for slot, sequence in zip(slots, sequences, strict=True):
            assert sequence.num_positions <= self.spec.kv_len, "admission checks the length"
            self._occupants[slot] = sequence
            self._extents[slot] = sequence.num_positions

    def _forward_prompts(
        self, bucket: Bucket, slots: list[int], sequences: list[Sequence]
    ) -> Tensor:
        """Logits after each prompt's last token, at the bucket's full shape: `[rows, vocab]`."""
        # A row that is not in use reads one token 0 and writes what the first row writes.
        unused = bucket.rows - len(slots)
        prompts = [sequence.prompt_token_ids for sequence in sequences] + [(0,)] * unused
        padded = [[*prompt, *[0] * (bucket.length - len(prompt))] for prompt in prompts]
        token_ids = torch.tensor(padded, device=self._device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self._device)
        position_ids = torch.arange(bucket.length, device=self._device).expand_as(token_ids)
        self.cache.write = PromptWrite(
            slots=torch.tensor([*slots, *slots[:1] * unused], device=self._device),
            source=torch.tensor([*range(len(slots)), *[0] * unused], device=self._device),
            padding=(position_ids >= lengths[:, None])[:, None, :, None],
        )
        return prompt_logits(self._model, token_ids, position_ids, self.cache, lengths - 1)

    def _forward_tokens(self) -> Tensor:
        """Logits after every slot's newest token, at the lane's full shape: `[slots, vocab]`."""
        self.cache.write = TokenWrite(self._positions)
        return next_logits(self._model, self._tokens, self._positions, self.cache)
