"""Schedules that the worker does not have: no grouping by length, no refill."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from shoal_worker.lanes import Bucket, LaneSpec, LaneTable
from shoal_worker.scheduler import Scheduler, Step
from shoal_worker.sequence import Sequence


@dataclass(frozen=True, slots=True)
class OneBucketLane(LaneSpec):
    """A lane that pads every prompt to the same length.

    Attributes:
        prompt_len: of its only bucket.
    """

    prompt_len: int = 0

    def buckets(self) -> tuple[Bucket, ...]:
        """The one."""
        rows = LaneSpec(self.service_class, self.slots, self.kv_len).buckets()[0].rows
        return (Bucket(rows, self.prompt_len),)


class WaveScheduler(Scheduler):
    """Runs batch after batch: none begins before the last sequence of the one before has ended."""

    def __init__(self, table: LaneTable) -> None:
        super().__init__(table)
        self._later: deque[Sequence] = deque()

    @property
    def num_waiting(self) -> int:
        """Sequences that no slot has yet."""
        return len(self._later) + super().num_waiting

    def add(self, sequence: Sequence) -> None:
        """Let it wait for a batch."""
        self._later.append(sequence)

    def schedule(self) -> Step | None:
        """The batch's next step, or the first of the next batch."""
        if not (super().num_waiting or self.num_running):
            self._begin_batch()
        return super().schedule()

    def _begin_batch(self) -> None:
        """As many as fit the slots of their lanes, in the order of their arrival."""
        free = {lane.name: lane.slots for lane in self.table.lanes}
        for _ in range(len(self._later)):
            sequence = self._later.popleft()
            lane = self.table.lane_for(sequence)
            assert lane is not None, "admission checks every sequence against the lane table"
            if free[lane.name]:
                free[lane.name] -= 1
                super().add(sequence)
            else:
                self._later.append(sequence)
