"""Throughput of the engine alone and through the queue, in turns, and where the time goes.

Owns the order of the measurement and its report. How it is shown is `throughput_table`'s.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from shoal_worker.bench.ceilings import measured_ceilings, size_of
from shoal_worker.bench.engine_alone import EngineAlone
from shoal_worker.bench.host import command_line, host
from shoal_worker.bench.repeats import Repeats, in_turns, ratio
from shoal_worker.bench.roofline import Ceilings, step_s, workload_s
from shoal_worker.bench.runs import PhaseTotal, Run
from shoal_worker.bench.steps import DecodeStep, decode_step, prefill_ms
from shoal_worker.bench.through_queue import ThroughQueue
from shoal_worker.bench.workloads import WARM_UP_PART, Choice, Workload, chosen_workload
from shoal_worker.engine import LoadedModel
from shoal_worker.settings import EngineSettings

ENGINE, QUEUE = "engine alone", "through the queue"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure.

    Attributes:
        rounds: in each of which everything runs once.
        calls: that a step's time is the mean of.
        through_queue: else the engine alone.
        redis_url: of a server to go through; None for an embedded one of our own.
    """

    workload: Choice
    rounds: int
    calls: int
    through_queue: bool = True
    redis_url: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured; times in the unit that their name ends in.

    Attributes:
        tokens_per_s: new tokens a second, by who made them.
        queue_ratio: through the queue against the engine alone.
        duration_s: of the engine's last run, which `phases` are of.
        step_bound_ms: the least that the hardware allows for `decode`'s step.
        bound_tokens_per_s: the most that it allows for the workload.
    """

    command: str
    host: dict[str, str]
    model: str
    dtype: str
    lanes: list[str]
    choices: dict[str, Any]
    workload: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    load_s: float
    warm_up_s: float
    tokens_per_s: dict[str, Repeats]
    queue_ratio: Repeats | None
    duration_s: float
    phases: dict[str, PhaseTotal]
    decode: DecodeStep
    prefill_ms: dict[str, float]
    ceilings: Ceilings
    step_bound_ms: float
    bound_tokens_per_s: float

    @property
    def roofline_ratio(self) -> float:
        """The engine's share of what the hardware allows for the workload."""
        return self.tokens_per_s[ENGINE].median / self.bound_tokens_per_s

    @property
    def step_roofline_ratio(self) -> float:
        """A decode step's share of it."""
        return self.step_bound_ms / self.decode.step_ms

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        ratios = {
            "roofline_ratio": self.roofline_ratio,
            "step_roofline_ratio": self.step_roofline_ratio,
        }
        phases = {
            name: {"padding_ratio": total.padding_ratio, "rows_ratio": total.rows_ratio}
            for name, total in self.phases.items()
        }
        record = asdict(self) | ratios
        for name, shares in phases.items():
            record["phases"][name] |= shares
        return record


def measure(settings: EngineSettings, wanted: Wanted, tell: Callable[[str], None]) -> Report:
    """Load, warm up, run in turns, then take a step apart.

    Args:
        tell: is told what happens next.
    """
    tell("loading and warming up the engine")
    engine = EngineAlone(settings)
    loaded = engine.engine.loaded
    workload = chosen_workload(
        wanted.workload, loaded.device.type, loaded.vocab_size, _encoder(loaded)
    )
    workload.check_fits(engine.engine.table.max_positions("bulk"))
    tell("measuring the device")
    ceilings = measured_ceilings(loaded.device, loaded.dtype)
    runs = _runs(engine, settings, workload, wanted, tell)
    tokens_per_s = {
        name: Repeats.of([run.tokens_per_s for run in of_name]) for name, of_name in runs.items()
    }
    tell("taking a step apart")
    size, lane = size_of(loaded), engine.busiest_lane()
    step = decode_step(engine.engine, lane, wanted.calls)
    least_s = workload_s(size, ceilings, workload.lengths, lane.slots)
    return Report(
        command=command_line(),
        host=host(loaded.device),
        model=loaded.name,
        dtype=str(loaded.dtype).removeprefix("torch."),
        lanes=[one.name for one in engine.engine.table.lanes],
        choices=asdict(engine.engine.choices),
        workload=workload.name,
        prompts=len(workload.requests),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        load_s=engine.load_s,
        warm_up_s=engine.warm_up_s,
        tokens_per_s=tokens_per_s,
        queue_ratio=(
            ratio(tokens_per_s[QUEUE], tokens_per_s[ENGINE]) if QUEUE in tokens_per_s else None
        ),
        duration_s=runs[ENGINE][-1].duration_s,
        phases={str(name): total for name, total in engine.steps.phases.items()},
        decode=step,
        prefill_ms=prefill_ms(engine.engine, lane, max(1, wanted.calls // 4)),
        ceilings=ceilings,
        step_bound_ms=1000 * step_s(size, ceilings, step.rows, step.context),
        bound_tokens_per_s=workload.new_tokens / least_s,
    )


def _encoder(loaded: LoadedModel) -> Callable[[str], list[int]]:
    def encode(text: str) -> list[int]:
        token_ids: list[int] = loaded.tokenizer(text)["input_ids"]
        return token_ids

    return encode


def _runs(
    engine: EngineAlone,
    settings: EngineSettings,
    workload: Workload,
    wanted: Wanted,
    tell: Callable[[str], None],
) -> dict[str, list[Run]]:
    """All runs in turns, after one of a part of the workload each, which is left out."""
    with ExitStack() as stack:
        run_once = {ENGINE: engine.run}
        if wanted.through_queue:
            tell("starting a worker")
            queue = stack.enter_context(ThroughQueue(settings, wanted.redis_url))
            run_once[QUEUE] = queue.run
        runs: dict[str, list[Run]] = {name: [] for name in run_once}
        for name, run in run_once.items():
            tell(f"warming up: {name}")
            run(workload.first(WARM_UP_PART))
        for number, name in in_turns(list(run_once), wanted.rounds):
            tell(f"round {number + 1} of {wanted.rounds}: {name}")
            runs[name].append(run_once[name](workload))
        return runs
