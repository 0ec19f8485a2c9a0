"""Whether logits have the same bits in every fresh process and next to any company.

`python -m shoal_worker.bench.repeatability --help`. Each process decodes the same sequences twice,
next to idle slots and next to other sequences, and gives a digest each time: of all their tokens,
and of their logits after each call of the engine.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import click
import torch
from torch import Tensor

from shoal.wire import SamplingParams
from shoal_worker.bench.random_models import random_model
from shoal_worker.bench.shapes import DEFAULT_SHAPE, SHAPES
from shoal_worker.engine import Engine
from shoal_worker.lanes import LaneSpec, LaneTable
from shoal_worker.scheduler import Decode, Prefill, Row
from shoal_worker.sequence import SampledToken, Sequence, SequenceKey

PROMPT_TOKENS = 16
_FACTOR = 0x5851F42D4C957F2D
_OCCUPANCIES = ("idle", "full")


def digests_of(engine: Engine, lane: LaneSpec, num_steps: int, occupancy: str) -> list[int]:
    """Decode a quarter of the slots next to idle or to full ones.

    Returns:
        A digest of their logits after each call of the engine, and one of their tokens.
    """
    compared = tuple(Row(slot, _sequence(slot, num_steps)) for slot in range(0, lane.slots, 4))
    rows = compared
    if occupancy == "full":
        others = (Row(slot, _sequence(-slot, num_steps)) for slot in range(lane.slots) if slot % 4)
        rows = tuple(sorted((*compared, *others), key=lambda row: row.slot))
    bucket = lane.bucket_for(PROMPT_TOKENS)
    # The compared rows enter alone, then the others: each at another place of its prefill.
    for group in (compared, [row for row in rows if row.slot % 4]):
        for start in range(0, len(group), bucket.rows):
            part = tuple(group[start : start + bucket.rows])
            _take(part, engine.prefill(Prefill(lane, bucket, part)))
    slots = torch.tensor([row.slot for row in compared], device=engine.loaded.device)
    digests = []
    while min(len(row.sequence.output_token_ids) for row in rows) < num_steps:
        _take(rows, engine.decode(Decode(lane, rows)))
        digests.append(_checksum(engine.lanes[lane.name].logits[slots]))
    for row in rows:
        engine.release(lane, row.slot)
    tokens = [tuple(row.sequence.output_token_ids[:num_steps]) for row in compared]
    return [*torch.stack(digests).tolist(), hash(tuple(tokens))]


def _take(rows: tuple[Row, ...], tokens: list[list[SampledToken]]) -> None:
    for row, row_tokens in zip(rows, tokens, strict=True):
        row.sequence.output_token_ids.extend(token.token_id for token in row_tokens)


def _checksum(logits: Tensor) -> Tensor:
    """A sum of the bits that depends on their places."""
    width = torch.int16 if logits.dtype.itemsize == 2 else torch.int32
    bits = logits.contiguous().view(width).to(torch.int64).flatten()
    places = torch.arange(1, len(bits) + 1, device=bits.device)
    return (bits * (places * _FACTOR)).sum()


def _sequence(number: int, num_steps: int) -> Sequence:
    return Sequence(
        key=SequenceKey("bench", abs(number), 0),
        prompt_token_ids=tuple((number * 31 + place * 7) % 251 for place in range(PROMPT_TOKENS)),
        sampling=SamplingParams(max_tokens=num_steps + 4, temperature=1.0, top_k=50),
        seed=abs(number),
        service_class="bulk",
    )


def _in_fresh_processes(arguments: list[str], processes: int, at_once: int) -> Iterator[str]:
    command = [sys.executable, "-m", __spec__.name, "--processes", "0", *arguments]
    for start in range(0, processes, at_once):
        running = [
            subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            for _ in range(start, min(processes, start + at_once))
        ]
        for process in running:
            yield process.communicate()[0].strip()


@click.command()
@click.option("--shape", type=click.Choice(list(SHAPES)), default=DEFAULT_SHAPE, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default=None)
@click.option("--slots", default=32, show_default=True)
@click.option("--kv-len", default=1024, show_default=True)
@click.option("--steps", default=1000, show_default=True)
@click.option("--processes", default=5, show_default=True, help="Fresh ones; 0 uses this one.")
def main(
    shape: str, device: str | None, slots: int, kv_len: int, steps: int, processes: int
) -> None:
    """Print the digests of every process; leave with 1 unless all are equal."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if processes:
        options = {"shape": shape, "device": device, "slots": slots, "kv-len": kv_len}
        given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        # Several on a CPU would take far longer than one after another: their threads wait busily.
        at_once = processes if device == "cuda" else 1
        outputs = []
        for output in _in_fresh_processes([*given, "--steps", str(steps)], processes, at_once):
            click.echo(output)
            outputs.append(output)
        sys.exit(len({line for output in outputs for line in output.splitlines()}) != 1)
    lane = LaneSpec("bulk", slots, kv_len, fine=device == "cpu")
    engine = Engine(random_model(shape, device), LaneTable([lane]))
    for occupancy in _OCCUPANCIES:
        digests = digests_of(engine, lane, steps, occupancy)
        click.echo(f"{hash(tuple(digests)) % 2**64:016x}")


if __name__ == "__main__":
    main()
