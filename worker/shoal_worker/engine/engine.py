"""The engine: runs the scheduler's steps on a model, one token a row.

Owns the lanes and their memory, allocated once. Knows no Redis, no clock and nothing of what waits:
a step says which rows to run, the answer is their tokens.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from shoal.errors import ModelError
from shoal.wire import MAX_LOGPROBS, SamplingParams
from shoal_worker.engine.fingerprint import fingerprint_of
from shoal_worker.engine.lane import Lane
from shoal_worker.engine.memory import available_bytes, readable
from shoal_worker.engine.model import LoadedModel
from shoal_worker.engine.probe import probe
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

    Raises:
        ModelError: the lanes do not fit the memory, or the model cannot run on slots.
    """

    def __init__(self, loaded: LoadedModel, table: LaneTable) -> None:
        self.loaded = loaded
        self.table = table
        self._lanes = _allocated(loaded, table)

    @property
    def fingerprint(self) -> str:
        """Names everything that decides a token: the loaded model's and the lanes."""
        lanes = ",".join(spec.name for spec in self.table.lanes)
        return fingerprint_of({"model": self.loaded.fingerprint, "lanes": lanes})

    @torch.inference_mode()
    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        """Read the rows' prompts into their slots: one first token for each row, in order."""
        slots, sequences = _unzipped(step)
        drawn = self._lanes[step.lane.name].prefill(step.bucket, slots, sequences)
        return [[token] for token in drawn.to_host()]

    @torch.inference_mode()
    def decode(self, step: Decode) -> list[list[SampledToken]]:
        """One more token for each of the rows, in order."""
        slots, sequences = _unzipped(step)
        drawn = self._lanes[step.lane.name].decode(slots, sequences)
        return [[token] for token in drawn.to_host()]

    @torch.inference_mode()
    def release(self, lane: LaneSpec, slot: int) -> None:
        """The slot is idle from now on; call it before another sequence enters."""
        self._lanes[lane.name].release(slot)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Run every shape once, so that the first request pays for no set-up.

        The rows are all alike, so we see on the way whether their places make a difference.
        """
        for lane in self._lanes.values():
            alike = {_warmed_up(lane, bucket) for bucket in lane.spec.buckets()}
            if False in alike:
                log.warning(
                    "lane %s gives equal rows unequal results, so a result depends on its company; "
                    "set MKL_CBWR=AUTO or fewer threads",
                    lane.spec.name,
                )


def _unzipped(step: Prefill | Decode) -> tuple[list[int], list[Sequence]]:
    return [row.slot for row in step.rows], [row.sequence for row in step.rows]


def _warmed_up(lane: Lane, bucket: Bucket) -> bool:
    """Run a bucket and the lane with the same sequence in many slots: whether all get the same."""
    # From the first slot to the last, since it is by place that threads share the rows.
    slots = [row * lane.spec.slots // bucket.rows for row in range(bucket.rows)]
    prompt = tuple(place % 2 for place in range(max(1, bucket.length // 2)))
    sampling = SamplingParams(max_tokens=1, temperature=0.0, logprobs=MAX_LOGPROBS)
    sequences = [Sequence(SequenceKey("warm-up", 0, 0), prompt, sampling, 0) for _ in slots]
    tokens = lane.prefill(bucket, slots, sequences).to_host()
    next_tokens = lane.decode(slots, sequences).to_host()
    for slot in slots:
        lane.release(slot)
    return all(token == tokens[0] for token in tokens) and all(
        token == next_tokens[0] for token in next_tokens
    )


def _allocated(loaded: LoadedModel, table: LaneTable) -> dict[str, Lane]:
    shapes = probe(loaded.model)
    needed = sum(Lane.bytes_needed(spec, shapes, loaded.vocab_size) for spec in table.lanes)
    free = available_bytes(loaded.device)
    if free is not None and needed > free:
        raise _too_large(table, needed, free)
    for spec in table.lanes:
        assert spec.kv_len <= loaded.max_positions, f"{spec.name} is longer than the model takes"
    try:
        return {
            spec.name: Lane(loaded.model, spec, shapes, loaded.vocab_size) for spec in table.lanes
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
