"""A way to run the workload, as a value: the engine's settings, and old ways instead of its own.

Pure data, which travels to the process that runs it. The default is what `shoal worker` does.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

Loading = Literal["mapped", "state_dict"]
Attention = Literal["engine", "eager"]
TopK = Literal["engine", "ordered", "unordered", "scatter", "mask", "sort"]
Tokenising = Literal["batched", "single", "python"]


@dataclass(frozen=True, slots=True)
class Arm:
    """What differs from the default.

    Attributes:
        settings: of `shoal worker`, by name; the last of a name counts.
        loading: weights mapped from their file, or a model initialised and then filled.
        inference_mode: else `torch.no_grad`.
        kv_cache: else every step reads prompt and completion again.
        attention: the engine's, or scores and weights as matrices of their own.
        keep_attentions: have the model return its attention weights; needs eager attention.
        keep_hidden_states: have it return what every layer made.
        top_k: how the k likeliest tokens are drawn from: by the engine, or after its step.
        grouping: prompts padded to buckets; else everything runs at the longest one's length.
        lanes_by_length: a short and a long lane; None for what the device has by default.
        refill: a finished slot is refilled; else a batch ends before the next one begins.
        slots: of each lane; None for the workload's.
        tokenising: the text of all prompts at once, one by one, or in Python.
    """

    settings: tuple[tuple[str, Any], ...] = ()
    loading: Loading = "mapped"
    inference_mode: bool = True
    kv_cache: bool = True
    attention: Attention = "engine"
    keep_attentions: bool = False
    keep_hidden_states: bool = False
    top_k: TopK = "engine"
    grouping: bool = True
    lanes_by_length: bool | None = None
    refill: bool = True
    slots: int | None = None
    tokenising: Tokenising = "single"

    def with_settings(self, **settings: Any) -> Arm:
        """The same with other settings of the worker."""
        return replace(self, settings=tuple(sorted((dict(self.settings) | settings).items())))

    def without_setting(self, name: str) -> Arm:
        """The same with one setting at its default."""
        return replace(self, settings=tuple(pair for pair in self.settings if pair[0] != name))


DEFAULT = Arm()
