"""What the hardware allows: the shortest time that a step or a workload can take.

The roofline model of Williams, Waterman and Patterson ("Roofline: an insightful visual performance
model for multicore architectures", Communications of the ACM 52(4), 2009): work takes at least
max(bytes / bandwidth, operations / rate). Bytes and operations are the least that any engine needs
which keeps keys and values:

    a decode step   weights once, and every row's live keys and values once;
                    2 operations a weight and row, 4 · width · context a layer and row
    a prefill       2 operations a weight and prompt token, the output layer for the last one alone;
                    attention over what precedes each token; its bytes are left out

Activations, logits, sampling and writes count nothing, so a share of 1 is out of reach. Pure
arithmetic; rates come from `ceilings`, sizes from the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device was measured to reach.

    Attributes:
        bytes_per_s: read from memory, or copied.
        operations_per_s: of matrix products, in the model's number format.
    """

    bytes_per_s: float
    operations_per_s: float


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model costs.

    Attributes:
        block_weights: numbers that every token is multiplied with, without the output layer's.
        output_weights: the output layer's.
        bytes_per_weight: in memory.
        layers: that attend.
        attention_width: query heads times their size.
        kv_bytes_per_token: keys and values of all layers.
    """

    block_weights: int
    output_weights: int
    bytes_per_weight: float
    layers: int
    attention_width: int
    kv_bytes_per_token: int

    @property
    def weight_bytes(self) -> float:
        """What a step reads of them."""
        return (self.block_weights + self.output_weights) * self.bytes_per_weight

    def attention_operations(self, contexts: float) -> float:
        """Of tokens whose contexts have so many positions in sum."""
        return 4 * self.layers * self.attention_width * contexts


@dataclass(frozen=True, slots=True)
class Lengths:
    """One sequence: tokens in its prompt, and new ones."""

    prompt: int
    new: int


def step_s(size: ModelSize, ceilings: Ceilings, rows: int, context: float) -> float:
    """The least seconds of a decode step of so many rows, each with `context` live positions."""
    num_bytes = size.weight_bytes + rows * context * size.kv_bytes_per_token
    products = 2 * rows * (size.block_weights + size.output_weights)
    operations = products + size.attention_operations(rows * context)
    return _least_s(ceilings, num_bytes, operations)


def workload_s(
    size: ModelSize, ceilings: Ceilings, sequences: Sequence[Lengths], slots: int
) -> float:
    """The least seconds of a whole workload, at most `slots` sequences at once.

    A prefill makes a sequence's first token, decode steps the others; steps are as full as can be.
    """
    prompt_tokens = sum(one.prompt for one in sequences)
    # The token at position i attends to i + 1 positions.
    prompt_contexts = sum(one.prompt * (one.prompt + 1) // 2 for one in sequences)
    products = 2 * (prompt_tokens * size.block_weights + len(sequences) * size.output_weights)
    prefill_s = _least_s(ceilings, 0.0, products + size.attention_operations(prompt_contexts))

    decoded = sum(one.new - 1 for one in sequences)
    contexts = sum((one.new - 1) * one.prompt + (one.new - 1) * one.new // 2 for one in sequences)
    longest = max(one.new - 1 for one in sequences)
    num_steps = max(math.ceil(decoded / slots), longest)
    num_bytes = num_steps * size.weight_bytes + contexts * size.kv_bytes_per_token
    products = 2 * decoded * (size.block_weights + size.output_weights)
    operations = products + size.attention_operations(contexts)
    return prefill_s + _least_s(ceilings, num_bytes, operations)


def _least_s(ceilings: Ceilings, num_bytes: float, operations: float) -> float:
    return max(num_bytes / ceilings.bytes_per_s, operations / ceilings.operations_per_s)
