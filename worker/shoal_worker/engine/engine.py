"""The engine: runs the scheduler's steps on a model, one token a row.

Owns the lanes and their memory, allocated once. Knows no Redis, no clock and nothing of what waits:
a step says which rows to run, the answer is their tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch

from shoal.errors import ModelError
from shoal.wire import MAX_LOGPROBS, SamplingParams
from shoal_worker.engine.activation import fuse_activations
from shoal_worker.engine.fingerprint import fingerprint_of
from shoal_worker.engine.lane import Lane
from shoal_worker.engine.memory import available_bytes, readable
from shoal_worker.engine.model import LoadedModel
from shoal_worker.engine.options import EngineOptions
from shoal_worker.engine.output_layer import pad_output_layer
from shoal_worker.engine.packed import pack_linear_layers
from shoal_worker.engine.probe import probe
from shoal_worker.engine.runtime import Runtime
from shoal_worker.lanes import Bucket, LaneSpec, LaneTable
from shoal_worker.sequence import SampledToken, Sequence, SequenceKey

if TYPE_CHECKING:
    from shoal_worker.scheduler import Decode, Prefill

log = logging.getLogger("shoal.engine")


class Engine:
    """A model with its lanes.

    Args:
        loaded: the model.
        table: the lanes; all of their memory is taken at once.
        options: how steps are run; by default as was measured to be best on the device.

    Raises:
        ModelError: the lanes do not fit the memory, or the model cannot run on slots.
    """

    def __init__(
        self, loaded: LoadedModel, table: LaneTable, options: EngineOptions | None = None
    ) -> None:
        self.loaded = loaded
        self.table = table
        self.choices = (options or EngineOptions()).on(loaded.device)
        pad_output_layer(loaded.model)
        fuse_activations(loaded.model, native=self.choices.kernels)
        live = pack_linear_layers(loaded.model) if self.choices.kernels else None
        runtime = Runtime(self.choices, loaded.device, loaded.vocab_size, live)
        self.lanes = _allocated(loaded, table, runtime, int8_cache=self.choices.kv_dtype == "int8")

    @property
    def runs_ahead(self) -> bool:
        """Whether steps are launched before the last ones are read."""
        return self.choices.run_ahead

    @property
    def fingerprint(self) -> str:
        """Names everything that decides a token: the loaded model's and the lanes."""
        lanes = ",".join(spec.name for spec in self.table.lanes)
        deciding = self.choices.deciding()
        return fingerprint_of({"model": self.loaded.fingerprint, "lanes": lanes, **deciding})

    @torch.inference_mode()
    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        """Read the rows' prompts into their slots.

        Returns:
            Each row's first token, in order; none where `decode` brings it with the next ones.
        """
        slots, sequences = _unzipped(step)
        lane = self.lanes[step.lane.name]
        with self._on_device():
            lane.prefill(step.bucket, slots, sequences)
            if self.choices.run_ahead:
                return [[] for _ in sequences]
            return lane.read(sequences, num_left=0)

    @torch.inference_mode()
    def decode(
        self, step: Decode, meanwhile: Callable[[], bool] = lambda: False
    ) -> list[list[SampledToken]]:
        """Launch the rows' next tokens.

        Args:
            meanwhile: called until it says false or there are tokens to read.

        Returns:
            New tokens of each of the step's sequences, in order. When running ahead, those that
            were launched before, so that the device works while they are looked at: a row may then
            have none.
        """
        slots, sequences = _unzipped(step)
        lane = self.lanes[step.lane.name]
        with self._on_device():
            launched = lane.decode(slots, sequences, self.choices.decode_steps)
            num_left = int(launched and self.choices.run_ahead)
            while not lane.has_arrived(num_left) and meanwhile():
                pass
            return lane.read([*sequences, *step.spent], num_left)

    @torch.inference_mode()
    def take_spent(self, lane: LaneSpec) -> list[int]:
        """Slots that have come free since the last call, as all their tokens are launched.

        Another sequence may enter one and runs behind those; `decode` goes on bringing them.
        """
        return self.lanes[lane.name].take_spent() if self.choices.run_ahead else []

    @torch.inference_mode()
    def release(self, lane: LaneSpec, slot: int) -> None:
        """The slot is idle from now on; call it before another sequence enters."""
        self.lanes[lane.name].release(slot)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every shape once, so that the first request pays for no set-up.

        The rows are all alike, so we see on the way whether their places make a difference.
        """
        for lane in self.lanes.values():
            # Graphs are recorded the second time.
            shapes = lane.spec.buckets() * (1 + self.choices.cuda_graphs)
            with self._on_device():
                alike = {_warmed_up(lane, bucket) for bucket in shapes}
            if False in alike:
                log.warning(
                    "lane %s gives equal rows unequal results, so a result depends on its company; "
                    "set MKL_CBWR=AUTO or fewer threads",
                    lane.spec.name,
                )

    def _on_device(self) -> AbstractContextManager[Any]:
        """Makes the model's GPU the current one: graphs, events and Triton's kernels go there."""
        device = self.loaded.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _unzipped(step: Prefill | Decode) -> tuple[list[int], list[Sequence]]:
    return [row.slot for row in step.rows], [row.sequence for row in step.rows]


def _warmed_up(lane: Lane, bucket: Bucket) -> bool:
    """Run a bucket and the lane with the same sequence in many slots: whether all get the same."""
    # From the first slot to the last, since it is by place that threads share the rows.
    slots = [row * lane.spec.slots // bucket.rows for row in range(bucket.rows)]
    prompt = tuple(place % 2 for place in range(max(1, bucket.length // 2)))
    sampling = SamplingParams(max_tokens=2, temperature=0.0, logprobs=MAX_LOGPROBS)
    sequences = [Sequence(SequenceKey("warm-up", 0, 0), prompt, sampling, 0) for _ in slots]
    lane.prefill(bucket, slots, sequences)
    lane.decode(slots, sequences, max_steps=1)
    tokens = lane.read(sequences, num_left=0)
    for slot in slots:
        lane.release(slot)
    return all(row == tokens[0] for row in tokens)


def _allocated(
    loaded: LoadedModel, table: LaneTable, runtime: Runtime, *, int8_cache: bool
) -> dict[str, Lane]:
    shapes = probe(loaded.model)
    if int8_cache:
        shapes = tuple(shape.as_int8() for shape in shapes)
    needed = sum(Lane.bytes_needed(spec, shapes, loaded.vocab_size) for spec in table.lanes)
    free = available_bytes(loaded.device)
    if free is not None and needed > free:
        raise _too_large(table, needed, free)
    for spec in table.lanes:
        assert spec.kv_len <= loaded.max_positions, f"{spec.name} is longer than the model takes"
    try:
        return {
            spec.name: Lane(loaded.model, spec, shapes, loaded.vocab_size, runtime)
            for spec in table.lanes
        }
    # torch's own out-of-memory errors are RuntimeErrors; on a CPU there is no narrower one.
    except RuntimeError:
        raise _too_large(table, needed, free) from None


def _too_large(table: LaneTable, needed: int, free: int | None) -> ModelError:
    lanes = ", ".join(spec.name for spec in table.lanes)
    there_is = "" if free is None else f" and there are {readable(free)}"
    return ModelError(
        f"the lanes {lanes} need {readable(needed)} of memory{there_is}; "
        "set fewer or shorter lanes with --lanes or SHOAL_LANES"
    )
