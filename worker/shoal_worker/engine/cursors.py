"""Where each slot of a lane stands, on the device, so that a step reads nothing back for the next.

Owns the newest token of each slot, its position and its last one. Knows no sequences.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal_worker.engine.transfer import to_device


class Cursors:
    """Tensors of `[slots]` that stay where they are.

    Attributes:
        tokens: what each slot reads next.
        positions: where it reads it; 0 in idle slots.
        limits: the last position that its sequence has; steps past its end stay there.
        drawn_inside: 1 where a step that runs now draws and advances by itself, else 0.
        asked: true where anybody reads what a step makes.
    """

    def __init__(self, num_slots: int, device: torch.device) -> None:
        self._device = device
        self._num_slots = num_slots
        self.tokens, self.positions, self.limits, self.drawn_inside = (
            torch.zeros(num_slots, dtype=torch.int64, device=device) for _ in range(4)
        )
        self.asked = torch.zeros(num_slots, dtype=torch.bool, device=device)
        self._idle: set[int] = set()
        self._chosen: tuple[frozenset[int], frozenset[int]] = frozenset(), frozenset()

    def enter(self, slots: Tensor, positions: Tensor, limits: Tensor, tokens: Tensor) -> None:
        """Place sequences whose prompts have been read; a slot may be named twice, alike."""
        self.positions[slots] = positions
        self.limits[slots] = limits
        self.tokens[slots] = tokens

    def occupy(self, slots: list[int]) -> None:
        """Sequences are about to enter these slots."""
        self._idle.difference_update(slots)

    def leave(self, slot: int) -> None:
        """The slot is idle from the next step on."""
        self._idle.add(slot)

    def choose(self, asked: frozenset[int], inside: frozenset[int]) -> None:
        """Set up the steps that follow, and send idle slots to 0.

        Args:
            asked: the slots whose tokens are wanted.
            inside: those of them that advance within a step.
        """
        if (asked, inside) == self._chosen and not self._idle:
            return
        masks = [
            [int(slot in asked) for slot in range(self._num_slots)],
            [int(slot in inside) for slot in range(self._num_slots)],
            [int(slot not in self._idle) for slot in range(self._num_slots)],
        ]
        wanted, chosen, occupied = to_device(masks, torch.int64, self._device)
        self.asked.copy_(wanted)
        self.drawn_inside.copy_(chosen)
        self.positions.mul_(occupied)
        self._chosen = asked, inside
        self._idle.clear()

    def advance_inside(self, drawn: Tensor) -> None:
        """Move the slots that advance within a step: `drawn` is `[slots]`."""
        self.tokens.copy_(torch.where(self.drawn_inside.bool(), drawn, self.tokens))
        self.positions.add_(self.drawn_inside)
        torch.minimum(self.positions, self.limits, out=self.positions)

    def advance(self, slots: Tensor, drawn: Tensor) -> None:
        """Move some slots: `slots` and `drawn` are `[rows]`."""
        self.tokens[slots] = drawn
        self.positions[slots] = torch.minimum(self.positions[slots] + 1, self.limits[slots])
