"""Step times of a lane: where a decode step's time goes, and how long a prefill takes.

Owns the steps that are timed, made by hand without scheduler and text. Knows no workload.
"""

from __future__ import annotations

from dataclasses import dataclass

from shoal.wire import SamplingParams
from shoal_worker.bench.breakdown import Breakdown, breakdown, timed_ms
from shoal_worker.bench.workloads import SAMPLING
from shoal_worker.engine import Engine
from shoal_worker.lanes import LaneSpec
from shoal_worker.scheduler import Decode, Prefill, Row
from shoal_worker.sequence import Sequence, SequenceKey

PROMPT_TOKENS = 72
WARM_CALLS = 3


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A decode step of a lane's full shape, every slot in use.

    Attributes:
        context: live positions of a row, on average over the steps timed.
        steps: that are launched in one call, which is what `call` measured.
    """

    lane: str
    rows: int
    context: float
    steps: int
    call: Breakdown

    @property
    def step_ms(self) -> float:
        """Of one step."""
        return self.call.wall_ms / self.steps


def decode_step(engine: Engine, lane: LaneSpec, max_calls: int) -> DecodeStep:
    """Time a full lane whose sequences have just been prefilled.

    Args:
        max_calls: that a time is the mean of; fewer where the lane's positions end before.
    """
    rows = _filled(engine, lane)
    step = Decode(lane, rows)
    num_steps = engine.choices.decode_steps
    prompt, room = len(rows[0].sequence.prompt_token_ids), rows[0].sequence.sampling.max_tokens - 1
    num_calls = min(max_calls, (room // num_steps - WARM_CALLS) // 2)
    assert num_calls > 0, f"lane {lane.name} is too short for {num_steps} steps a call"
    for _ in range(WARM_CALLS):
        engine.decode(step)
    call = breakdown(lambda: engine.decode(step), engine.loaded.device, num_calls)
    for row in rows:
        engine.release(lane, row.slot)
    # A step reads its prompt, the tokens made before and the one it is given.
    context = prompt + num_steps * (WARM_CALLS + num_calls / 2) + 0.5
    return DecodeStep(lane.name, lane.slots, context, num_steps, call)


def prefill_ms(engine: Engine, lane: LaneSpec, num_calls: int) -> dict[str, float]:
    """Milliseconds of a full prefill in each bucket."""
    times = {}
    for bucket in lane.buckets():
        rows = tuple(
            Row(slot, _sequence(slot, min(bucket.length, lane.kv_len - 1), 1))
            for slot in range(bucket.rows)
        )
        step = Prefill(lane, bucket, rows)
        engine.prefill(step)
        name = f"{bucket.rows}x{bucket.length}"
        times[name] = timed_ms(lambda: engine.prefill(step), engine.loaded.device, num_calls)  # noqa: B023
        for row in rows:
            engine.release(lane, row.slot)
    return times


def _filled(engine: Engine, lane: LaneSpec) -> tuple[Row, ...]:
    """A sequence in every slot, prefilled, with room for as many tokens as the lane has."""
    prompt_tokens = min(PROMPT_TOKENS, lane.kv_len // 2)
    max_tokens = lane.kv_len - prompt_tokens
    bucket = lane.bucket_for(prompt_tokens)
    rows = tuple(
        Row(slot, _sequence(slot, prompt_tokens, max_tokens)) for slot in range(lane.slots)
    )
    for start in range(0, len(rows), bucket.rows):
        engine.prefill(Prefill(lane, bucket, rows[start : start + bucket.rows]))
    return rows


def _sequence(number: int, prompt_tokens: int, max_tokens: int) -> Sequence:
    return Sequence(
        key=SequenceKey("bench", number, 0),
        prompt_token_ids=tuple((number * 31 + place * 7) % 251 for place in range(prompt_tokens)),
        sampling=SamplingParams(max_tokens=max_tokens, **SAMPLING),
        seed=number,
        service_class="bulk",
    )
