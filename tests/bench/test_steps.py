"""The measurements run on any device and account for the time they measure."""

from __future__ import annotations

import pytest
from tests.engine.serving import loaded_model

from shoal_worker.bench.steps import decode_step, prefill_ms
from shoal_worker.engine import Engine
from shoal_worker.lanes import LaneSpec, LaneTable

LANE = LaneSpec("bulk", 4, 64)


@pytest.fixture
def engine() -> Engine:
    """One short lane of a tiny model."""
    return Engine(loaded_model(), LaneTable([LANE]))


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")
def test_a_breakdown_s_parts_add_up(engine: Engine) -> None:
    step = decode_step(engine, LANE, max_calls=2)

    assert sum(step.call.parts_ms.values()) == pytest.approx(step.call.device_ms)
    assert {"attention", "matrix products"} <= set(step.call.parts_ms)
    assert step.step_ms == step.call.wall_ms > 0


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")
def test_a_step_s_context_is_the_mean_of_what_its_calls_read(engine: Engine) -> None:
    step = decode_step(engine, LANE, max_calls=2)

    # 32 tokens of prompt; three calls to warm up read 33 to 35 positions, two are timed.
    assert (step.rows, step.context) == (4, (36 + 37) / 2)


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")
def test_no_more_calls_are_made_than_a_lane_has_positions(engine: Engine) -> None:
    # 31 steps fit: 3 to warm up, and 14 each for both kinds of timing.
    assert decode_step(engine, LANE, max_calls=1000).context == 32 + 3 + (1 + 14) / 2


def test_every_bucket_has_its_time(engine: Engine) -> None:
    assert list(prefill_ms(engine, LANE, num_calls=1)) == ["4x32", "4x64"]
