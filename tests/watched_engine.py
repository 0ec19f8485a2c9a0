"""An engine process without a model that goes through the real serving loop, slowly enough to see.

`python -m tests.watched_engine PIPE LOG_LEVEL`. A step takes 20 ms. More than two rows whose
prompts begin with `M` do not fit into memory together. It takes two seconds to leave, so that a
worker's last figures can be scraped.
"""

from __future__ import annotations

import sys
import time

from tests.fakes import FakeClock, FakeEngine, LetterTokenizer

from shoal_worker import engine_process
from shoal_worker.lanes import parse_table
from shoal_worker.loop import ServingLoop
from shoal_worker.messages import Ready
from shoal_worker.scheduler import Decode, Prefill, Scheduler
from shoal_worker.settings import EngineSettings
from shoal_worker.text import TextCodec

STEP_S = 0.02
LEAVES_IN_S = 2.0
GREEDY = ord("M")


class WatchedEngine(FakeEngine):
    """Letters, at a pace, from a memory that holds two greedy rows."""

    def __init__(self) -> None:
        super().__init__(FakeClock())

    def _begin(self, step: Prefill | Decode) -> None:
        greedy = [row for row in step.rows if row.sequence.prompt_token_ids[0] == GREEDY]
        if len(greedy) > 2:
            raise MemoryError("scripted to be out of memory")
        time.sleep(STEP_S)
        super()._begin(step)


def load(settings: EngineSettings) -> tuple[ServingLoop, Ready]:
    """What `engine_process.load` would make of a model."""
    table = parse_table("interactive=4x64,bulk=8x64", 64)
    codec = TextCodec(LetterTokenizer(), frozenset({0}), 0x110000, table)
    # Its shapes are not declared as warm: each is a miss once.
    loop = ServingLoop(
        WatchedEngine(), Scheduler(table), codec, model_name="scripted", fingerprint="f" * 16
    )
    lanes = {lane.name: lane.slots for lane in table.lanes}
    return loop, Ready("scripted", "f" * 16, "cpu", "float32", 12, lanes, 0.01, 12 * 64)


if __name__ == "__main__":
    engine_process.load = load
    engine_process._main(sys.argv[1:])
    time.sleep(LEAVES_IN_S)
