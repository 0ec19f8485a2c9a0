"""Steps as events: what each one computed, how long it took, and whether its shape was new.

Owns the set of warmed-up shapes and the time each lane last ran. Pure: times are parameters.
"""

from __future__ import annotations

from collections.abc import Mapping

from shoal_worker.events import StepRun
from shoal_worker.lanes import LaneTable
from shoal_worker.scheduler import Decode, Prefill, Step


class StepObserver:
    """Turns steps that were run into events.

    Attributes:
        num_shape_misses: steps that met a shape for the first time after it should be warm.
    """

    def __init__(self) -> None:
        self.num_shape_misses = 0
        self._shapes: set[tuple[object, ...]] = set()
        self._lane_ended_s: dict[str, float] = {}

    def declare(self, table: LaneTable) -> None:
        """All shapes of the table have been warmed up: any other is a miss."""
        for lane in table.lanes:
            self._shapes.add((lane, None))
            self._shapes.update((lane, bucket) for bucket in lane.buckets())

    def observe(
        self,
        step: Step,
        *,
        new_tokens: Mapping[str, int],
        num_first_tokens: int,
        num_passes: int,
        started_s: float,
        ended_s: float,
    ) -> StepRun:
        """The event of a step.

        Args:
            new_tokens: tokens that its rows kept, by queue.
            num_first_tokens: of those, the ones that a prefill has made.
            num_passes: tokens that the engine made for every row, kept or not.
        """
        shape = (step.lane, step.bucket if isinstance(step, Prefill) else None)
        if shape not in self._shapes:
            self._shapes.add(shape)
            self.num_shape_misses += 1
        # What a row waits between tokens includes the prefills and other lanes in between; it does
        # not include idle time, for a lane that was idle prefills before it decodes.
        since_s = self._lane_ended_s.get(step.lane.name, started_s)
        self._lane_ended_s[step.lane.name] = ended_s
        if isinstance(step, Prefill):
            return _prefill_run(step, ended_s - started_s)
        # Idle slots, and tokens made behind a row's end.
        num_decoded = sum(new_tokens.values()) - num_first_tokens
        num_padding = step.lane.slots * num_passes - num_decoded
        return _decode_run(step, new_tokens, num_padding, ended_s - since_s)


def _prefill_run(step: Prefill, duration_s: float) -> StepRun:
    return StepRun(
        "prefill",
        step.lane.name,
        rows=len(step.rows),
        slots=step.bucket.rows,
        tokens=step.num_tokens,
        padding_tokens=step.num_padding_tokens,
        duration_s=duration_s,
    )


def _decode_run(
    step: Decode, new_tokens: Mapping[str, int], num_padding: int, duration_s: float
) -> StepRun:
    return StepRun(
        "decode",
        step.lane.name,
        rows=len(step.rows),
        slots=step.lane.slots,
        tokens=sum(new_tokens.values()),
        padding_tokens=num_padding,
        duration_s=duration_s,
        tokens_by_queue=tuple(new_tokens.items()),
    )
