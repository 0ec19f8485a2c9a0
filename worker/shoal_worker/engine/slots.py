"""What a lane's slots remember for sampling: parameters, token counts, and who draws how.

Owns tensors with one entry a slot, written when a sequence enters, and the plan that steps follow.
A plan holds for as long as the same sequences are in the slots, so a step builds nothing for a row.
Knows neither the model nor the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal_worker.engine.params import RowParams
from shoal_worker.engine.plan import Drawn, Plan, Traits, make_plan, penalties_of
from shoal_worker.engine.sampling import log_probabilities, penalise, sample
from shoal_worker.engine.transfer import to_device
from shoal_worker.sequence import Sequence


class SlotSampling:
    """The sampling side of a lane.

    Args:
        num_slots: rows of the lane.
        vocab_size: logits of a row.
        device: where the model runs.

    Attributes:
        params: of all slots.
        num_generated: `[slots]`, tokens that each slot's sequence has drawn.
    """

    def __init__(self, num_slots: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size = vocab_size
        self.device = device
        self.params = RowParams.empty(num_slots, device)
        self._penalties = torch.zeros(num_slots, 3, device=device)
        self.num_generated = torch.zeros(num_slots, dtype=torch.int64, device=device)
        self._in_prompt = torch.zeros(num_slots, vocab_size, dtype=torch.bool, device=device)
        self._counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self._traits: dict[int, Traits] = {}
        self._plan: tuple[tuple[int, ...], Plan] | None = None

    @staticmethod
    def bytes_per_slot(vocab_size: int) -> int:
        """Memory of one slot's token counts; the rest is small."""
        return vocab_size * (torch.bool.itemsize + torch.int32.itemsize)

    def enter(self, slots: list[int], sequences: list[Sequence]) -> None:
        """Take over the parameters of sequences that begin in these slots."""
        index = to_device(slots, torch.int64, self.device)
        self.params.put(index, RowParams.of(sequences, self.vocab_size, self.device))
        penalties = [penalties_of(sequence.sampling) for sequence in sequences]
        self._penalties[index] = to_device(penalties, torch.float32, self.device)
        self.num_generated[index] = 0
        for slot, sequence in zip(slots, sequences, strict=True):
            traits = Traits.of(sequence, self.vocab_size)
            self._traits[slot] = traits
            if traits.penalised:
                self._count_prompt(slot, sequence)
        self._plan = None

    def leave(self, slot: int) -> None:
        """Forget a slot that is idle from now on."""
        self._traits.pop(slot, None)
        self._plan = None

    def not_plain(self, slots: list[int], max_top_k: int) -> tuple[int, ...]:
        """Those of the slots whose rows ask for more than a top-k of that size at most."""
        return tuple(slot for slot in slots if not self._traits[slot].is_plain(max_top_k))

    def plan(self, slots: tuple[int, ...]) -> Plan:
        """How the rows in these slots draw; made anew only when they are not the last call's."""
        if self._plan is None or self._plan[0] != slots:
            traits = [self._traits[slot] for slot in slots]
            self._plan = slots, make_plan(slots, traits, self.params)
        return self._plan[1]

    def draw(self, logits: Tensor, plan: Plan) -> Drawn:
        """Choose each row's next token and count it.

        Args:
            logits: `[rows, vocab]`, as the model gave them; may be overwritten.
            plan: of these rows.
        """
        logits = logits.to(torch.float32)
        raw = None if plan.logprobs is None else logits[plan.logprobs]
        num_generated = self.num_generated[plan.slots]
        tokens = sample(
            self._adjusted(logits, plan, num_generated), plan.params, num_generated, plan.groups
        )
        logprobs = None
        if raw is not None:
            logprobs = log_probabilities(raw, tokens[plan.logprobs], plan.max_logprobs)
        # Last: a draw that runs out of memory before is made again.
        self._count(tokens, plan)
        return Drawn(plan, tokens, logprobs)

    def _adjusted(self, logits: Tensor, plan: Plan, num_generated: Tensor) -> Tensor:
        """Logits after bias, penalties and minimum length, in place: `[rows, vocab]`."""
        if (bias := plan.bias) is not None:
            logits.index_put_((bias.rows, bias.ids), bias.values, accumulate=True)
        if (rows := plan.penalised) is not None:
            slots = plan.slots[rows]
            logits[rows] = penalise(
                logits[rows], self._in_prompt[slots], self._counts[slots], self._penalties[slots]
            )
        if (bans := plan.bans) is not None:
            too_short = num_generated[bans.rows] < bans.until
            additions = torch.where(too_short, -torch.inf, 0.0).to(logits.dtype)
            logits.index_put_((bans.rows, bans.ids), additions, accumulate=True)
        return logits

    def _count(self, tokens: Tensor, plan: Plan) -> None:
        self.num_generated[plan.slots] += 1
        if (rows := plan.penalised) is not None:
            self._counts[plan.slots[rows], tokens[rows]] += 1

    def _count_prompt(self, slot: int, sequence: Sequence) -> None:
        prompt = to_device(sequence.prompt_token_ids, torch.int64, self.device)
        self._in_prompt[slot] = False
        self._in_prompt[slot, prompt] = True
        self._counts[slot] = 0
