"""One lane at work: its cache, its slots, and the passes over them.

Owns what happens to a lane's slots and in which order it is launched; results are read later. Knows
no scheduler and no clock.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Layers

import torch
from torch import Tensor
from transformers import PreTrainedModel

from shoal_worker.engine.cache import LaneCache, LayerShape, TokenWrite
from shoal_worker.engine.cursors import Cursors
from shoal_worker.engine.forward import next_logits, prompt_logits
from shoal_worker.engine.graphs import Pass
from shoal_worker.engine.launched import Launched, LaunchQueue
from shoal_worker.engine.memory import with_room
from shoal_worker.engine.plan import Reports
from shoal_worker.engine.prompts import PromptInputs
from shoal_worker.engine.runtime import Runtime
from shoal_worker.engine.slots import SlotSampling
from shoal_worker.engine.transfer import ToHost, to_device
from shoal_worker.lanes import Bucket, LaneSpec
from shoal_worker.sequence import SampledToken, Sequence


class Lane:
    """A lane's slots, each idle or with the one sequence that was prefilled into it last.

    Args:
        model: runs with our attention.
        spec: the lane's shape.
        shapes: what each layer of the model keeps for a token.
        vocab_size: logits of a row.
        runtime: how passes are run.

    Attributes:
        logits: `[slots, vocab]`, the last decode step's, for whoever compares bits.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spec: LaneSpec,
        shapes: Layers[LayerShape],
        vocab_size: int,
        runtime: Runtime,
    ) -> None:
        self.spec = spec
        self._model = model
        self._device = model.device
        self._runtime = runtime
        self._native = runtime.kernels and self._device.type == "cpu"
        self.cache = LaneCache(shapes, spec.slots, spec.kv_len, self._device, native=self._native)
        self.logits = torch.empty(0, device=self._device)
        self._sampling = SlotSampling(spec.slots, vocab_size, self._device)
        self._cursors = Cursors(spec.slots, self._device)
        self._token_write = TokenWrite(self._cursors.positions)
        self._next_logits = runtime.compiled(self._forward_tokens)
        self._decode_pass = Pass(self._decode_step, runtime.graph_pool)
        self._prefill_passes: dict[Bucket, _PrefillPass] = {}
        self._launched = LaunchQueue()
        self._occupants: list[Sequence | None] = [None] * spec.slots
        # Tokens that were launched for each slot's sequence.
        self._num_launched = [0] * spec.slots
        # By slot, sequences that can have no more tokens than were launched.
        self._spent: dict[int, Sequence] = {}
        # Positions of each slot that may hold something other than zero.
        self._extents = [0] * spec.slots

    @staticmethod
    def bytes_needed(spec: LaneSpec, shapes: Layers[LayerShape], vocab_size: int) -> int:
        """Memory that a lane of this shape takes for itself."""
        kv_bytes = spec.kv_len * sum(shape.bytes_per_token for shape in shapes)
        return spec.slots * (kv_bytes + SlotSampling.bytes_per_slot(vocab_size))

    def prefill(self, bucket: Bucket, slots: list[int], sequences: list[Sequence]) -> None:
        """Read prompts into slots and draw each one's first token.

        Args:
            bucket: the shape to run at.
            slots: a slot for each sequence; whoever was there is gone.
            sequences: at most as many as the bucket has rows.
        """
        self._enter(bucket, slots, sequences)
        if bucket not in self._prefill_passes:
            self._prefill_passes[bucket] = _PrefillPass(bucket, self._prefill_step, self._runtime)
        prefill = self._prefill_passes[bucket]
        planned = self._planned(slots)
        prefill.inputs.fill(slots, sequences, frozenset(slots) - frozenset(planned))
        with_room(prefill.run)
        reports = []
        if planned:
            rows = to_device([slots.index(slot) for slot in planned], torch.int64, self._device)
            plan = self._sampling.plan(planned)
            drawn = with_room(lambda: self._sampling.draw(prefill.logits[rows], plan))
            self._cursors.tokens[plan.slots] = drawn.tokens
            reports.append(drawn.reports())
        self._launch(slots, sequences, self._cursors.tokens[None], planned, reports)

    def decode(self, slots: list[int], sequences: list[Sequence], max_steps: int) -> bool:
        """Draw the next tokens of the sequences in these slots; other slots stay as they are.

        Args:
            slots: a slot for each sequence.
            sequences: as they were prefilled.
            max_steps: fewer are made where no sequence may have so many tokens.

        Returns:
            Whether there was anything to draw.
        """
        left = 0
        for slot, sequence in zip(slots, sequences, strict=True):
            assert self._occupants[slot] is sequence, f"slot {slot} holds another sequence"
            if left < max_steps:
                left = max(left, sequence.sampling.max_tokens - self._num_launched[slot])
        num_steps = min(left, max_steps)
        if num_steps <= 0:
            return False
        planned = self._planned(slots)
        self._cursors.choose(frozenset(slots), frozenset(slots) - frozenset(planned))
        tokens = self._cursors.tokens.new_empty(num_steps, self.spec.slots)
        reports = []
        for step_tokens in tokens:
            with_room(self._decode_pass)
            if planned:
                reports.append(self._draw_planned(planned))
            step_tokens.copy_(self._cursors.tokens)
        self._launch(slots, sequences, tokens, planned, reports)
        return True

    def has_arrived(self, num_left: int) -> bool:
        """Whether `read` need not wait."""
        return self._launched.has_arrived(num_left)

    def read(self, sequences: list[Sequence], num_left: int) -> list[list[SampledToken]]:
        """The sequences' unread tokens, from all calls but the last `num_left`."""
        return self._launched.read(sequences, num_left)

    def take_spent(self) -> list[int]:
        """Leave all slots whose last tokens are launched; `read` still gives those."""
        occupants = self._occupants
        spent = [slot for slot, sequence in self._spent.items() if occupants[slot] is sequence]
        self._spent.clear()
        for slot in spent:
            occupants[slot] = None
            self._leave(slot)
        return spent

    def release(self, slot: int) -> None:
        """Leave a slot idle: it goes on being computed, at its first position, for nobody."""
        sequence, self._occupants[slot] = self._occupants[slot], None
        if sequence is not None:
            self._launched.forget(sequence)
        self._leave(slot)

    def _leave(self, slot: int) -> None:
        self._sampling.leave(slot)
        self._cursors.leave(slot)

    def _enter(self, bucket: Bucket, slots: list[int], sequences: list[Sequence]) -> None:
        assert 1 <= len(slots) <= bucket.rows, f"{len(slots)} rows for a bucket of {bucket.rows}"
        extent = max(self._extents[slot] for slot in slots)
        # Our kernel never touches what is behind a slot's position.
        if extent > bucket.length and not self._runtime.kernels:
            index = to_device(slots, torch.int64, self._device)
            self.cache.clear(index, bucket.length, extent)
        self._sampling.enter(slots, sequences)
        self._cursors.occupy(slots)
        for slot, sequence in zip(slots, sequences, strict=True):
            assert sequence.num_positions <= self.spec.kv_len, "admission checks the length"
            if (last := self._occupants[slot]) is not None:
                self._launched.forget(last)
            self._occupants[slot] = sequence
            self._num_launched[slot] = 0
            self._extents[slot] = sequence.num_positions

    def _planned(self, slots: list[int]) -> tuple[int, ...]:
        """Those of the slots whose tokens are drawn after a pass, not within it."""
        if self._runtime.draw is None:
            return tuple(slots)
        return self._sampling.not_plain(slots, self._runtime.max_top_k)

    def _launch(
        self,
        slots: list[int],
        sequences: list[Sequence],
        tokens: Tensor,
        planned: tuple[int, ...],
        reports: list[Reports | None],
    ) -> None:
        num_steps = len(tokens)  # Not in the loop: a tensor takes a microsecond to say it.
        spent = []
        for slot, sequence in zip(slots, sequences, strict=True):
            self._num_launched[slot] += num_steps
            if self._num_launched[slot] >= sequence.sampling.max_tokens:
                self._spent[slot] = sequence
                spent.append(sequence)
        self._launched.add(Launched(slots, sequences, ToHost(tokens), planned, reports, spent))

    def _draw_planned(self, slots: tuple[int, ...]) -> Reports | None:
        plan = self._sampling.plan(slots)
        # A slot that is not asked for wrote its newest token where it will write it again.
        drawn = with_room(lambda: self._sampling.draw(self.logits[plan.slots], plan))
        self._cursors.advance(plan.slots, drawn.tokens)
        return drawn.reports()

    def _prefill_step(self, inputs: PromptInputs) -> Tensor:
        """Read prompts at the bucket's full shape: logits after each one's last token."""
        self.cache.write = write = inputs.write()
        with self._runtime.reading(~write.padding[:, 0, :, 0]):
            logits = prompt_logits(
                self._model,
                inputs.token_ids,
                inputs.position_ids(),
                self.cache,
                inputs.lengths - 1,
                native=self._native,
            )
        tokens = torch.zeros_like(inputs.slots)
        if self._runtime.draw is not None:
            params = self._sampling.params.take(inputs.slots)
            tokens = self._runtime.draw(logits, params, torch.zeros_like(inputs.slots))
        source = inputs.source
        self._cursors.enter(inputs.slots, inputs.lengths[source], inputs.limits, tokens[source])
        self._sampling.num_generated[inputs.slots] = inputs.drawn_inside
        return logits

    def _decode_step(self) -> None:
        """Read every slot's newest token at the lane's full shape, and draw what can be drawn."""
        cursors = self._cursors
        self.cache.write = self._token_write
        with self._runtime.reading(cursors.asked[:, None]):
            self.logits = self._next_logits(cursors.tokens, cursors.positions)
        if self._runtime.draw is not None:
            sampling = self._sampling
            drawn = self._runtime.draw(self.logits, sampling.params, sampling.num_generated)
            cursors.advance_inside(drawn)
            sampling.num_generated.add_(cursors.drawn_inside)

    def _forward_tokens(self, tokens: Tensor, positions: Tensor) -> Tensor:
        masked = not self._runtime.kernels
        return next_logits(self._model, tokens, positions, self.cache, masked=masked)


class _PrefillPass:
    """One bucket's inputs, its pass, and the logits that it leaves: `[rows, vocab]`."""

    def __init__(
        self, bucket: Bucket, step: Callable[[PromptInputs], Tensor], runtime: Runtime
    ) -> None:
        self.inputs = PromptInputs(bucket, runtime.device)
        self.logits = torch.empty(0, device=runtime.device)
        self._step = step
        self.run = Pass(self._run, runtime.graph_pool)

    def _run(self) -> None:
        self.logits = self._step(self.inputs)
