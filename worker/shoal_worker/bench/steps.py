"""Step times of a lane and a workload's speed: `python -m shoal_worker.bench.steps --help`."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict, dataclass, fields
from typing import Any

import click
import torch

from shoal.wire import SamplingParams
from shoal_worker.bench.breakdown import Breakdown, breakdown, synchronize, timed_ms
from shoal_worker.bench.random_models import SHAPES, random_model
from shoal_worker.bench.workloads import SAMPLING, WORKLOADS, jobs, requests
from shoal_worker.engine import Engine
from shoal_worker.engine.fingerprint import hardware
from shoal_worker.engine.options import EngineOptions
from shoal_worker.engine.tokenizer import DirectTokenizer
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.loop import ServingLoop
from shoal_worker.messages import JobDone
from shoal_worker.scheduler import Decode, Prefill, Row, Scheduler
from shoal_worker.sequence import Sequence, SequenceKey
from shoal_worker.text import TextCodec

PROMPT_TOKENS = 72
WARM_CALLS = 3
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True, slots=True)
class Throughput:
    """A workload, from the first step to the last result.

    Attributes:
        submit_s: taking the requests in, before the first step.
    """

    workload: str
    prompts: int
    new_tokens: int
    submit_s: float
    duration_s: float
    tokens_per_s: float


def decode_breakdown(engine: Engine, lane: LaneSpec, num_calls: int) -> Breakdown:
    """A decode call of a full lane whose sequences have just been prefilled."""
    rows = _filled(engine, lane)
    step = Decode(lane, rows)
    num_steps = engine.choices.decode_steps * (2 * num_calls + WARM_CALLS)
    room = rows[0].sequence.sampling.max_tokens - 1
    assert num_steps <= room, f"{num_steps} steps do not fit the {room} positions left"
    for _ in range(WARM_CALLS):
        engine.decode(step)
    result = breakdown(lambda: engine.decode(step), engine.loaded.device, num_calls)
    for row in rows:
        engine.release(lane, row.slot)
    return result


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


def throughput(engine: Engine, workload: str, num_prompts: int) -> Throughput:
    """Run a workload through the serving loop, all of it there from the beginning."""
    loaded = engine.loaded
    loop = ServingLoop(
        engine,
        Scheduler(engine.table),
        TextCodec(
            DirectTokenizer(loaded.tokenizer),
            loaded.eos_token_ids,
            loaded.vocab_size,
            engine.table,
        ),
        model_name=loaded.name,
        fingerprint=engine.fingerprint,
    )
    all_requests = requests(workload, num_prompts, loaded.vocab_size)
    submitted = list(jobs(all_requests))
    started_s = time.perf_counter()
    for job in submitted:
        loop.submit(job)
    first_step_s = time.perf_counter()
    done = 0
    while done < len(submitted):
        done += sum(isinstance(message, JobDone) for message in loop.step())
    synchronize(loaded.device)
    duration_s = time.perf_counter() - first_step_s
    new_tokens = sum(request.sampling.max_tokens for request in all_requests)
    return Throughput(
        workload=workload,
        prompts=num_prompts,
        new_tokens=new_tokens,
        submit_s=first_step_s - started_s,
        duration_s=duration_s,
        tokens_per_s=new_tokens / duration_s,
    )


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


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default="gpt2-small", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None)
@click.option("--dtype", type=click.Choice(list(_DTYPES)), default=None)
@click.option("--slots", default=32, show_default=True)
@click.option("--kv-len", default=256, show_default=True)
@click.option("--calls", default=20, show_default=True, help="Calls that a time is the mean of.")
@click.option("--workload", type=click.Choice(WORKLOADS), default="W1", show_default=True)
@click.option("--prompts", default=256, show_default=True, help="Of the workload; 0 leaves it out.")
@click.option("--cuda-graphs/--no-cuda-graphs", default=None)
@click.option("--compile/--no-compile", default=None)
@click.option("--kernels/--no-kernels", default=None)
@click.option("--decode-steps", type=int, default=None)
@click.option("--run-ahead/--no-run-ahead", default=None)
@click.option("--kv-dtype", type=click.Choice(["auto", "int8"]), default="auto", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def main(**options: Any) -> None:
    """Measure prefill, decode and a whole workload on one lane of a model with random weights."""
    device = options["device"] or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = random_model(options["shape"], device, _DTYPES.get(options["dtype"]))
    lane = LaneSpec("bulk", options["slots"], options["kv_len"], fine=device == "cpu")
    chosen = {field.name: options[field.name] for field in fields(EngineOptions)}
    engine = Engine(loaded, LaneTable([lane]), EngineOptions(**chosen))
    started_s = time.perf_counter()
    engine.warm_up()
    synchronize(loaded.device)
    # As a worker's engine process does it.
    gc.collect()
    gc.freeze()
    report: dict[str, Any] = {
        "hardware": hardware(loaded.device),
        "model": f"{loaded.name} {loaded.dtype}",
        "lane": lane.name,
        "choices": asdict(engine.choices),
        "warm_up_s": time.perf_counter() - started_s,
        "prefill_ms": prefill_ms(engine, lane, options["calls"]),
        "decode": asdict(decode_breakdown(engine, lane, options["calls"])),
    }
    if options["prompts"]:
        throughput(engine, options["workload"], min(options["prompts"], lane.slots))
        report["throughput"] = asdict(throughput(engine, options["workload"], options["prompts"]))
    click.echo(json.dumps(report) if options["as_json"] else _readable(report))


def _readable(report: Any, indent: str = "") -> str:
    lines = []
    for name, value in report.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}:", _readable(value, indent + "  ")]
        else:
            shown = f"{value:.3f}" if isinstance(value, float) else value
            lines.append(f"{indent}{name[:100]}: {shown}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
