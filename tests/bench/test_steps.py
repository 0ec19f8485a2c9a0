"""The measurements run on any device and account for the time they measure."""

from __future__ import annotations

from dataclasses import replace

import pytest
from tests.engine.serving import loaded_model

from shoal_worker.bench.steps import decode_breakdown, prefill_ms, throughput
from shoal_worker.engine import Engine
from shoal_worker.lanes import LaneSpec, LaneTable

LANE = LaneSpec("bulk", 4, 64)


@pytest.fixture
def engine() -> Engine:
    """One short lane of a tiny model."""
    return Engine(loaded_model(), LaneTable([LANE]))


@pytest.mark.filterwarnings("ignore:.*[Pp]rofiler.*")
def test_a_breakdown_s_parts_add_up(engine: Engine) -> None:
    result = decode_breakdown(engine, LANE, num_calls=2)

    assert sum(result.parts_ms.values()) == pytest.approx(result.device_ms)
    assert {"attention", "matrix products"} <= set(result.parts_ms)
    assert result.wall_ms > 0


def test_every_bucket_has_its_time(engine: Engine) -> None:
    assert list(prefill_ms(engine, LANE, num_calls=1)) == ["4x32", "4x64"]


def test_a_workload_runs_to_its_last_token() -> None:
    lane = LaneSpec("bulk", 4, 256)
    loaded = replace(loaded_model(max_position_embeddings=256), max_positions=256)

    result = throughput(Engine(loaded, LaneTable([lane])), "W1", 6)

    assert (result.prompts, result.new_tokens) == (6, 6 * 64)
    assert result.tokens_per_s == pytest.approx(6 * 64 / result.duration_s)
