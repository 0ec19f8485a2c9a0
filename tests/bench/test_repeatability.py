"""The digests tell equal logits from unequal ones, and on a CPU they are equal in any company."""

from __future__ import annotations

import torch
from tests.engine.serving import loaded_model
from torch import nn

from shoal_worker.bench.repeatability import digests_of
from shoal_worker.engine import Engine
from shoal_worker.engine.reproducible import pin_arithmetic
from shoal_worker.lanes import LaneSpec, LaneTable

LANE = LaneSpec("bulk", 8, 64)

# Before the process's first matrix product, as a worker does it.
pin_arithmetic()


def test_company_changes_no_digest() -> None:
    engine = Engine(loaded_model(), LaneTable([LANE]))

    idle = digests_of(engine, LANE, 6, "idle")

    assert digests_of(engine, LANE, 6, "full") == idle
    assert len(set(idle)) == len(idle)


def test_one_bit_of_one_logit_changes_the_digest() -> None:
    loaded = loaded_model()
    engine = Engine(loaded, LaneTable([LANE]))
    before = digests_of(engine, LANE, 3, "idle")

    def flip(_: nn.Module, __: object, logits: torch.Tensor) -> torch.Tensor:
        logits.view(torch.int32)[4, 0, 77] ^= 1
        return logits

    with loaded.model.get_output_embeddings().register_forward_hook(flip):
        after = digests_of(engine, LANE, 3, "idle")

    assert after[0] != before[0]
