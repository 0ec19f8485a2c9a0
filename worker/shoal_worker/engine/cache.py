"""The KV cache of one lane: preallocated, written at each row's own position.

Owns the keys and values of all layers, `[slot, kv_head, position, head_dim]` each. Knows neither
sequences nor sampling. Invariant: every position of a slot is zero or was written by the sequence
that is in it, so that no NaN of an earlier one meets a weight of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache

from shoal_worker.engine.quantized import FACTOR_BYTES, quantized


class LayerShape(NamedTuple):
    """What one layer keeps for a token."""

    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values together."""
        return self.kv_heads * (self.key_dim + self.value_dim) * self.dtype.itemsize

    def as_int8(self) -> LayerShape:
        """The same in the form that `quantized` gives."""
        dims = self.key_dim + FACTOR_BYTES, self.value_dim + FACTOR_BYTES
        return LayerShape(self.kv_heads, *dims, torch.int8)


@dataclass(frozen=True, slots=True)
class PromptWrite:
    """Where a prefill's keys and values go.

    Rows that are not in use repeat the first row's write, so that the shape never changes and no
    other slot is touched.

    Attributes:
        slots: `[rows]`, the slot that each row writes.
        source: `[rows]`, the computed row that goes there.
        lengths: `[rows]`, of the computed rows' prompts.
        padding: `[rows, 1, length, 1]`, true past the end of a computed row's prompt.
    """

    slots: Tensor
    source: Tensor
    lengths: Tensor
    padding: Tensor


@dataclass(frozen=True, slots=True)
class TokenWrite:
    """Where a decode step's keys and values go: `positions` is `[slots]`."""

    positions: Tensor


def _kept(states: Tensor, cache: Tensor) -> Tensor:
    """Keys or values as the cache keeps them."""
    return quantized(states) if cache.dtype == torch.int8 else states


class LaneCache(Cache):
    """Keys and values of a lane's slots, for any model that takes a transformers cache.

    Args:
        shapes: what each layer keeps.
        slots: rows.
        kv_len: positions of a row.
        device: where it is allocated.
        native: whether the CPU's native code writes it, which reads nothing behind a position.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        slots: int,
        kv_len: int,
        device: torch.device,
        *,
        native: bool = False,
    ) -> None:
        # No layer objects: the model sees an empty cache and takes positions from us.
        super().__init__(layers=[])
        self.kv_len = kv_len
        self._native = native
        self.keys = [
            torch.zeros(slots, s.kv_heads, kv_len, s.key_dim, dtype=s.dtype, device=device)
            for s in shapes
        ]
        self.values = [
            torch.zeros(slots, s.kv_heads, kv_len, s.value_dim, dtype=s.dtype, device=device)
            for s in shapes
        ]
        self.write: PromptWrite | TokenWrite | None = None
        self._all_slots = torch.arange(slots, device=device)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one layer's new keys and values; hand back what its attention reads.

        Args:
            key_states: `[rows, kv_head, length, head_dim]`.
            value_states: as key_states.
            layer_idx: the layer.

        Returns:
            The prompt's own for a prefill, all of the lane's for a decode step.
        """
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        # Not a match statement, which the compiler of the decode step does not know.
        write = self.write
        if isinstance(write, TokenWrite):
            self._append(key_states[:, :, 0], keys, write.positions)
            self._append(value_states[:, :, 0], values, write.positions)
            return keys, values
        assert write is not None, "a forward pass says first where it writes"
        if self._native:
            for states, cache in ((key_states, keys), (value_states, values)):
                torch.ops.shoal.write_prompts_cpu(
                    states, cache, write.slots, write.source, write.lengths
                )
            return key_states, value_states
        # Zeroed here too: a weight of zero does not cancel a NaN behind the prompt's end.
        key_states = key_states.masked_fill(write.padding, 0)
        value_states = value_states.masked_fill(write.padding, 0)
        length = write.padding.shape[2]
        kept_keys, kept_values = _kept(key_states, keys), _kept(value_states, values)
        keys[:, :, :length].index_copy_(0, write.slots, kept_keys[write.source])
        values[:, :, :length].index_copy_(0, write.slots, kept_values[write.source])
        return key_states, value_states

    def _append(self, states: Tensor, cache: Tensor, positions: Tensor) -> None:
        if self._native:
            torch.ops.shoal.append_cpu(states, cache, positions)
        else:
            cache[self._all_slots, :, positions] = _kept(states, cache)

    def clear(self, slots: Tensor, start: int, stop: int) -> None:
        """Zero positions `start` to `stop` of some slots."""
        for tensor in (*self.keys, *self.values):
            tensor[:, :, start:stop].index_fill_(0, slots, 0)
