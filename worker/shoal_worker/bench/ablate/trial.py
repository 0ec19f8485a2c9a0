"""One arm at work in this process: what `shoal worker` loads, with the arm's old ways put in.

Owns how an arm becomes a serving loop. Knows nothing of other arms: whoever compares asks two
trials in turn.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import shoal_worker.engine as engine_package
from shoal.wire import SamplingParams
from shoal_worker import engine_process
from shoal_worker.bench.ablate import old_ways
from shoal_worker.bench.ablate.answers import Counts, Metrics, Run
from shoal_worker.bench.ablate.arms import Arm
from shoal_worker.bench.ablate.launches import launched_by, num_compiled, unread_counted
from shoal_worker.bench.ablate.load import Load
from shoal_worker.bench.ablate.neighbours import Neighbours
from shoal_worker.bench.ablate.recompute import RecomputingEngine
from shoal_worker.bench.ablate.schedules import WaveScheduler
from shoal_worker.bench.ablate.slower_top_k import draw_after_the_pass, select_by
from shoal_worker.bench.breakdown import synchronize
from shoal_worker.engine import Engine
from shoal_worker.engine.probe import probe
from shoal_worker.events import RequestEnded
from shoal_worker.in_process import jobs_of
from shoal_worker.lanes import LaneSpec
from shoal_worker.messages import FromEngine, JobDone, JobRefused, Observed
from shoal_worker.scheduler import Decode, Prefill, Row
from shoal_worker.sequence import Sequence, SequenceKey
from shoal_worker.settings import read_engine_settings

_STATUS = Path("/proc/self/status")
_PROBE_TOKENS = 8


class ServingTrial:
    """An arm, loaded and warmed up.

    Args:
        stack: closing it puts back what the arm replaced.

    Raises:
        ModelError: the model cannot be loaded, or is too short for the workload.
    """

    def __init__(
        self, model: str, device: str, arm: Arm, load: Load, stack: ExitStack, *, warm_up: bool
    ) -> None:
        self._model, self._named = model, device
        self._arm = arm
        self._load = load
        self._engines: list[Engine | RecomputingEngine] = []
        settings = read_engine_settings(
            {"model": model, "device": device, "warm_up": warm_up, **dict(arm.settings)}
        )
        self._replace_ways(stack)
        self._loop, self._ready = engine_process.load(settings)
        (self._engine,) = self._engines
        # Not before: warming up reports log-probabilities, which need tokens in order.
        select_by(arm.top_k, stack)
        self._device = self._engine.loaded.device
        self._requests = load.requests(arm, self._engine.loaded.vocab_size)
        self.load_s = self._ready.load_s

    def _replace_ways(self, stack: ExitStack) -> None:
        _restore_switches(stack)
        arm = self._arm
        stack.enter_context(patch.object(engine_package, "Engine", self._make_engine))
        stack.enter_context(
            patch.object(
                engine_process,
                "lane_table",
                lambda _settings, max_positions, _bytes_per_token, gpu_bytes: self._load.table(
                    arm, max_positions, fine=gpu_bytes is None
                ),
            )
        )
        if not arm.refill:
            stack.enter_context(patch.object(engine_process, "Scheduler", WaveScheduler))
        if arm.top_k != "engine":
            draw_after_the_pass(stack)
        if arm.loading == "state_dict":
            old_ways.load_by_state_dict(stack)

    def _make_engine(self, loaded: Any, table: Any, options: Any) -> Engine | RecomputingEngine:
        """In the place of `Engine`: one that goes the arm's ways."""
        arm = self._arm
        made = (Engine if arm.kv_cache else RecomputingEngine)(loaded, table, options)
        if arm.attention == "eager":
            old_ways.attend_eagerly(loaded.model)
        changed: dict[str, Any] = {}
        if arm.keep_attentions:
            changed["output_attentions"] = True
        if arm.keep_hidden_states:
            changed["output_hidden_states"] = True
        if not arm.kv_cache:
            changed["use_cache"] = False
        if changed:
            old_ways.call_with(loaded.model, **changed)
        if not arm.inference_mode:
            old_ways.leave_inference_mode(made)
        self._engines.append(made)
        return made

    def run(self) -> Run:
        """The workload, all of it there from the beginning, to its last token."""
        submitted = list(jobs_of(self._requests))
        results: dict[str, Any] = {}
        ended: list[RequestEnded] = []
        synchronize(self._device)
        neighbours = Neighbours()
        started_s = time.perf_counter()
        for job in submitted:
            self._loop.submit(job)
        while len(results) < len(submitted):
            for message in self._loop.step():
                _take(message, results, ended)
        synchronize(self._device)
        duration_s = time.perf_counter() - started_s
        others_ratio = neighbours.ratio()
        completions = [
            tuple(result["completions"][0]["token_ids"])
            for job in submitted
            for result in results[job.job_id]["results"]
        ]
        later_s = [
            end.decode_s / (end.completion_tokens - 1) for end in ended if end.completion_tokens > 1
        ]
        metrics = {
            "tokens_per_s": sum(map(len, completions)) / duration_s,
            "ttft_s": median(end.ttft_s for end in ended if end.ttft_s is not None),
            "inter_token_s": median(later_s),
        }
        return Run(metrics, completions, others_ratio)

    def peaks(self) -> Metrics:
        """The most memory that this process has had so far."""
        peaks: Metrics = {}
        if _STATUS.exists():
            lines = _STATUS.read_text().splitlines()
            # Not getrusage: what it says of a new process begins with its parent's.
            (line,) = (line for line in lines if line.startswith("VmHWM:"))
            peaks["peak_rss_bytes"] = int(line.split()[1]) * 1024.0
        if self._device.type == "cuda":
            peaks["gpu_peak_bytes"] = float(torch.cuda.max_memory_allocated(self._device))
        return peaks

    def facts(self) -> dict[str, str]:
        """What this arm is."""
        shapes = probe(self._engine.loaded.model) if self._arm.attention == "engine" else ()
        kv_bytes = sum(shape.bytes_per_token for shape in shapes)
        return {
            "device": str(self._device),
            "dtype": self._ready.dtype,
            "model": self._ready.model_name,
            "kv_bytes_per_token": str(kv_bytes),
        }

    @torch.inference_mode()
    def logits(self) -> tuple[list[int], Any]:
        """Likeliest first tokens of fixed prompts, and the logits after them.

        Returns:
            `[rows]`, and a numpy array `[rows, vocab]` in float32.
        """
        lane = self._engine.table.lanes[0]
        rows = tuple(Row(slot, _probing(slot)) for slot in range(lane.slots))
        bucket = lane.bucket_for(_PROBE_TOKENS)
        for start in range(0, len(rows), bucket.rows):
            part = rows[start : start + bucket.rows]
            _extend(part, self._engine.prefill(Prefill(lane, bucket, part)))
        # The first call may bring the prefill's tokens alone.
        while any(len(row.sequence.output_token_ids) < 2 for row in rows):
            _extend(rows, self._engine.decode(Decode(lane, rows)))
        logits = self._last_logits(lane)[: len(rows), : self._engine.loaded.vocab_size]
        for row in rows:
            self._engine.release(lane, row.slot)
        firsts = [row.sequence.output_token_ids[0] for row in rows]
        return firsts, logits.to("cpu", torch.float32).numpy()

    def counts(self) -> Counts:
        """What one run launches, and how."""
        # A recorded pass dispatches nothing, so what it would is seen in a bare one.
        returned: list[int] = []
        launched = Counter(launched_by(lambda: returned.append(self._num_returned())))
        with unread_counted() as unread:
            # A compiled step refuses to be watched; that it is compiled is counted below.
            if dict(self._arm.settings).get("compile"):
                self.run()
            else:
                launched += Counter(launched_by(self.run))
        last = self._last_logits(self._engine.table.lanes[0])
        facts = {
            "float32 products": torch.get_float32_matmul_precision(),
            "cudnn.benchmark": str(torch.backends.cudnn.benchmark),
            "results made in inference mode": str(last.is_inference()),
            "graphs compiled": str(num_compiled()),
            "tensors returned by a pass": str(*returned),
        }
        return Counts(dict(launched), facts, max(unread, default=0))

    def load_counts(self) -> Counts:
        """What loading once more launches."""
        with ExitStack() as stack:
            return Counts(
                launched_by(
                    lambda: ServingTrial(
                        self._model, self._named, self._arm, self._load, stack, warm_up=False
                    )
                ),
                {},
            )

    def _last_logits(self, lane: LaneSpec) -> Tensor:
        if isinstance(self._engine, RecomputingEngine):
            return self._engine.logits
        return self._engine.lanes[lane.name].logits

    @torch.inference_mode()
    def _num_returned(self) -> int:
        """Tensors that the model hands back with its logits, as every pass does."""
        token = torch.zeros(1, 1, dtype=torch.int64, device=self._device)
        output = self._engine.loaded.model(input_ids=token, position_ids=token, use_cache=False)
        return 1 + len(output.attentions or ()) + len(output.hidden_states or ())


def _restore_switches(stack: ExitStack) -> None:
    """Put torch's process-wide switches back at the end."""
    stack.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
    stack.callback(setattr, torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)


def _take(message: FromEngine, results: dict[str, Any], ended: list[RequestEnded]) -> None:
    assert not isinstance(message, JobRefused), message
    if isinstance(message, JobDone):
        results[message.job_id] = message.result
    elif isinstance(message, Observed):
        ended += [event for event in message.events if isinstance(event, RequestEnded)]


def _probing(number: int) -> Sequence:
    return Sequence(
        key=SequenceKey("probe", number, 0),
        prompt_token_ids=tuple((number * 31 + place * 7) % 251 for place in range(_PROBE_TOKENS)),
        sampling=SamplingParams(max_tokens=2, temperature=0.0),
        seed=number,
        service_class="bulk",
    )


def _extend(rows: tuple[Row, ...], tokens: list[Any]) -> None:
    for row, row_tokens in zip(rows, tokens, strict=True):
        row.sequence.extend(row_tokens)
