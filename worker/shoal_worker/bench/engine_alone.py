"""The engine and its serving loop in this process, as `Generator` runs them, and their time.

Owns the engine that is measured. Knows no queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from shoal_worker.bench.breakdown import synchronize
from shoal_worker.bench.runs import Run, StepTotals
from shoal_worker.bench.workloads import Workload
from shoal_worker.engine import Engine
from shoal_worker.engine_process import load_engine, serving_loop
from shoal_worker.events import Phase
from shoal_worker.garbage import settle
from shoal_worker.in_process import InProcess
from shoal_worker.lanes import LaneSpec
from shoal_worker.settings import EngineSettings

if TYPE_CHECKING:
    from shoal_worker.scheduler import Decode, Prefill
    from shoal_worker.sequence import SampledToken


class EngineAlone:
    """An engine, warmed up.

    Attributes:
        load_s, warm_up_s: what that took.
        steps: of the last run.
    """

    def __init__(self, settings: EngineSettings) -> None:
        started_s = time.perf_counter()
        self.engine = load_engine(settings)
        loaded_s = time.perf_counter()
        self.engine.warm_up()
        synchronize(self.engine.loaded.device)
        self.load_s, self.warm_up_s = loaded_s - started_s, time.perf_counter() - loaded_s
        # As a worker's engine process does it.
        settle()
        self.steps = StepTotals()
        self._clock = _WatchedEngine(self.engine)
        loop = serving_loop(self.engine, self.engine.loaded.name, stand_in=self._clock)
        loop.declare_shapes()
        self._serving = InProcess(loop, subscriber=self.steps)

    def run(self, workload: Workload) -> Run:
        """All of it there from the beginning; counted from the first step to the last result."""
        self.steps.reset()
        self._clock.reset()
        results = self._serving.run(workload.requests)
        synchronize(self.engine.loaded.device)
        ended_s = time.perf_counter()
        workload.check_complete(results)
        for phase, seconds in self._clock.seconds.items():
            self.steps.phases[phase].seconds = seconds
        assert self._clock.first_step_s is not None, "a workload has requests"
        return Run(workload.new_tokens, ended_s - self._clock.first_step_s)

    def busiest_lane(self) -> LaneSpec:
        """The lane that made most of the last run's tokens."""
        name = self.steps.busiest_lane()
        return next(lane for lane in self.engine.table.lanes if lane.name == name)


class _WatchedEngine:
    """Stands before an engine and notes when and how long it is at work.

    Attributes:
        seconds: in its calls, by phase. Where steps are launched ahead, a call waits for the steps
            before it, whichever they were.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.first_step_s: float | None = None
        self.seconds: dict[Phase, float] = {"prefill": 0.0, "decode": 0.0}

    @property
    def runs_ahead(self) -> bool:
        """As the engine's."""
        return self._engine.runs_ahead

    def prefill(self, step: Prefill) -> list[list[SampledToken]]:
        """As the engine's."""
        started_s = self._started()
        tokens = self._engine.prefill(step)
        self.seconds["prefill"] += time.perf_counter() - started_s
        return tokens

    def decode(
        self, step: Decode, meanwhile: Callable[[], bool] = lambda: False
    ) -> list[list[SampledToken]]:
        """As the engine's; what the loop does meanwhile is in it."""
        started_s = self._started()
        tokens = self._engine.decode(step, meanwhile)
        self.seconds["decode"] += time.perf_counter() - started_s
        return tokens

    def take_spent(self, lane: LaneSpec) -> list[int]:
        """As the engine's."""
        return self._engine.take_spent(lane)

    def release(self, lane: LaneSpec, slot: int) -> None:
        """As the engine's."""
        self._engine.release(lane, slot)

    def _started(self) -> float:
        now_s = time.perf_counter()
        if self.first_step_s is None:
            self.first_step_s = now_s
        return now_s
