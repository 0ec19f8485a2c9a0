"""The naive engine: no cache, so that every step reads prompt and completion again.

Stands where `Engine` stands; draws as it does, so that its tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shoal_worker.engine.activation import fuse_activations
from shoal_worker.engine.forward import prompt_logits
from shoal_worker.engine.model import LoadedModel
from shoal_worker.engine.options import EngineOptions
from shoal_worker.engine.output_layer import pad_output_layer
from shoal_worker.engine.packed import pack_linear_layers
from shoal_worker.engine.params import RowParams
from shoal_worker.engine.plan import Traits, make_plan
from shoal_worker.engine.sampling import sample
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.scheduler import Decode, Prefill
from shoal_worker.sequence import SampledToken


class RecomputingEngine:
    """A model that keeps nothing between steps.

    Attributes:
        logits: `[rows, vocab]`, the last step's.
    """

    def __init__(
        self, loaded: LoadedModel, table: LaneTable, options: EngineOptions | None = None
    ) -> None:
        self.loaded = loaded
        self.table = table
        self.choices = (options or EngineOptions()).on(loaded.device)
        self.fingerprint = loaded.fingerprint
        self.logits = torch.empty(0, device=loaded.device)
        pad_output_layer(loaded.model)
        fuse_activations(loaded.model, native=self.choices.kernels)
        if self.choices.kernels:
            pack_linear_layers(loaded.model)

    @property
    def runs_ahead(self) -> bool:
        """It never does."""
        return False

    @torch.inference_mode()
    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        """The first token of each row."""
        return self._next(step)

    @torch.inference_mode()
    def decode(
        self, step: Decode, meanwhile: Callable[[], bool] = lambda: False
    ) -> list[list[SampledToken]]:
        """The next token of each row; nothing is done meanwhile."""
        del meanwhile
        return self._next(step)

    def take_spent(self, lane: LaneSpec) -> list[int]:
        """None: every token is read as it is made."""
        del lane
        return []

    @torch.inference_mode()
    def release(self, lane: LaneSpec, slot: int) -> None:
        """Nothing was kept."""

    @torch.inference_mode()
    def warm_up(self) -> None:
        """No shape is fixed, so there is none to be run before."""

    def _next(self, step: Prefill | Decode) -> list[list[SampledToken]]:
        sequences = [row.sequence for row in step.rows]
        vocab_size = self.loaded.vocab_size
        device = self.loaded.device
        self.logits = self._read([(*s.prompt_token_ids, *s.output_token_ids) for s in sequences])
        traits = [Traits.of(sequence, vocab_size) for sequence in sequences]
        params = RowParams.of(sequences, vocab_size, device)
        plan = make_plan(tuple(range(len(sequences))), traits, params)
        made = torch.tensor([len(s.output_token_ids) for s in sequences], device=device)
        logits = self.logits.to(torch.float32)
        tokens = sample(logits, plan.params, made, plan.groups)
        return [[SampledToken(token_id)] for token_id in tokens.tolist()]

    def _read(self, texts: list[tuple[int, ...]]) -> Tensor:
        lengths = torch.tensor([len(text) for text in texts], device=self.loaded.device)
        longest = max(map(len, texts))
        padded = [text + (0,) * (longest - len(text)) for text in texts]
        token_ids = torch.tensor(padded, device=self.loaded.device)
        position_ids = torch.arange(longest, device=token_ids.device).expand_as(token_ids)
        no_cache: Any = None
        return prompt_logits(self.loaded.model, token_ids, position_ids, no_cache, lengths - 1)
