"""Metrics of the engine: what steps count for, what is full, what is loaded."""

from __future__ import annotations

import dataclasses

import pytest
from prometheus_client import CollectorRegistry

from shoal_worker.engine_metrics import STEP_BOUNDS_S
from shoal_worker.events import EngineDied, EngineLoaded, EngineState, Event, StepRun
from shoal_worker.metrics import PrometheusMetrics

LANE = "bulk-32x256"

QUEUES = ("shoal-default", "shoal-bulk")

DECODE = StepRun(
    *("decode", LANE),
    rows=24,
    slots=32,
    tokens=24,
    padding_tokens=8,
    duration_s=0.0018,
    tokens_by_queue=(("shoal-default", 4), ("shoal-bulk", 20)),
)
PREFILL = StepRun("prefill", LANE, rows=3, slots=4, tokens=90, padding_tokens=38, duration_s=0.0041)
LOADED = EngineLoaded("gpt2", "f1", "cuda:0", "bfloat16", load_s=2.5, lanes={LANE: 32})
STATE = EngineState(24, 7, {LANE: (24, 32)}, kv_usage_ratio=0.25, shape_cache_misses=3)


class Observed:
    """The metrics and their registry, read back by name and labels."""

    def __init__(self, lanes: dict[str, int]) -> None:
        self.registry = CollectorRegistry()
        self.metrics = PrometheusMetrics(
            self.registry, model_name="gpt2", queues=QUEUES, lanes=lanes
        )

    def __call__(self, *events: Event) -> None:
        for event in events:
            self.metrics(event)

    def value(self, name: str, **labels: str) -> float | None:
        all_labels = {"model_name": "gpt2", **labels}
        return self.registry.get_sample_value(f"shoal_{name}", all_labels)

    def series(self) -> set[tuple[str, frozenset[tuple[str, str]]]]:
        return {
            (sample.name, frozenset(sample.labels.items()))
            for family in self.registry.collect()
            for sample in family.samples
        }

    def worker_infos(self) -> list[dict[str, str]]:
        return [dict(labels) for name, labels in self.series() if name == "shoal_worker_info"]


@pytest.fixture
def observed() -> Observed:
    return Observed({LANE: 32})


def test_lanes_that_come_with_the_engine_stand_at_0_too() -> None:
    late = Observed({})

    late(LOADED)

    early = Observed({LANE: 32})
    early(LOADED)
    assert late.series() == early.series()


def test_a_lane_that_nobody_announced_is_counted() -> None:
    observed = Observed({})

    observed(DECODE)

    assert observed.value("generation_tokens_total", lane=LANE) == 24
    assert observed.value("step_duration_seconds_count", lane=LANE, phase="prefill") == 0


def test_a_decode_step_is_one_interval_for_each_of_its_rows(observed: Observed) -> None:
    observed(DECODE, DECODE)

    name = "inter_token_latency_seconds"
    assert observed.value(f"{name}_count", queue="shoal-default") == 2 * 4
    assert observed.value(f"{name}_count", queue="shoal-bulk") == 2 * 20
    assert observed.value(f"{name}_sum", queue="shoal-bulk") == pytest.approx(40 * 0.0018)
    assert observed.value(f"{name}_bucket", queue="shoal-bulk", le="0.0015") == 0
    assert observed.value(f"{name}_bucket", queue="shoal-bulk", le="0.002") == 40


def test_a_step_of_several_tokens_spreads_its_time_over_them(observed: Observed) -> None:
    by_queue = (("shoal-bulk", 96),)
    observed(dataclasses.replace(DECODE, tokens=96, duration_s=0.0072, tokens_by_queue=by_queue))

    name = "inter_token_latency_seconds"
    assert observed.value(f"{name}_count", queue="shoal-bulk") == 96
    assert observed.value(f"{name}_bucket", queue="shoal-bulk", le="0.0015") == 0
    assert observed.value(f"{name}_bucket", queue="shoal-bulk", le="0.002") == 96


def test_a_decode_step_without_tokens_is_a_step_without_intervals(observed: Observed) -> None:
    observed(dataclasses.replace(DECODE, rows=0, tokens=0, tokens_by_queue=()))

    assert observed.value("inter_token_latency_seconds_count", queue="shoal-bulk") == 0
    assert observed.value("step_duration_seconds_count", lane=LANE, phase="decode") == 1


def test_a_step_is_one_duration_whatever_its_rows(observed: Observed) -> None:
    observed(DECODE, DECODE, PREFILL)

    assert observed.value("step_duration_seconds_count", lane=LANE, phase="decode") == 2
    assert observed.value("step_duration_seconds_count", lane=LANE, phase="prefill") == 1


def test_a_prefill_reads_prompts_and_makes_each_row_s_first_token(observed: Observed) -> None:
    observed(PREFILL, DECODE)

    assert observed.value("prompt_tokens_total", lane=LANE) == 90
    assert observed.value("generation_tokens_total", lane=LANE) == 3 + 24
    assert observed.value("padding_tokens_total", lane=LANE, phase="prefill") == 38
    assert observed.value("padding_tokens_total", lane=LANE, phase="decode") == 8
    assert observed.value("prefill_batch_rows_sum", lane=LANE) == 3


def test_gauges_follow_the_engine_s_state(observed: Observed) -> None:
    observed(STATE)

    assert observed.value("requests_running") == 24
    assert observed.value("requests_waiting") == 7
    assert observed.value("decode_slots_active", lane=LANE) == 24
    assert observed.value("decode_slots_total", lane=LANE) == 32
    assert observed.value("kv_cache_usage_ratio") == 0.25


def test_shape_misses_go_on_counting_over_an_engine_s_restart(observed: Observed) -> None:
    observed(LOADED, STATE, STATE, dataclasses.replace(STATE, shape_cache_misses=5))
    observed(LOADED, STATE)

    assert observed.value("shape_cache_misses_total") == 5 + 3


@pytest.mark.parametrize(
    ("out_of_memory", "was_split", "splits"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_a_death_is_a_split_if_memory_ran_out_and_halves_run_again(
    observed: Observed, *, out_of_memory: bool, was_split: bool, splits: int
) -> None:
    observed(EngineDied(out_of_memory, was_split))

    assert observed.value("engine_deaths_total") == 1
    assert observed.value("oom_splits_total") == splits


def test_another_engine_starts_empty_and_is_the_only_one_named(observed: Observed) -> None:
    observed(LOADED, STATE, dataclasses.replace(LOADED, fingerprint="f2", load_s=1.5))

    assert [info["fingerprint"] for info in observed.worker_infos()] == ["f2"]
    assert observed.value("model_load_seconds") == 1.5
    assert observed.value("requests_running") == 0
    assert observed.value("decode_slots_active", lane=LANE) == 0


def test_worker_info_says_version_device_dtype_and_fingerprint(observed: Observed) -> None:
    observed(LOADED)

    [info] = observed.worker_infos()
    assert info.pop("version").count(".") == 2
    assert info == {
        "model_name": "gpt2",
        "device": "cuda:0",
        "dtype": "bfloat16",
        "fingerprint": "f1",
    }


def test_step_buckets_are_fine_where_gpt_2_steps_are_and_hold_the_usual_objectives() -> None:
    assert STEP_BOUNDS_S[0] == 0.0005
    assert {0.01, 0.02, 0.05, 0.1, 0.2, 0.5} <= set(STEP_BOUNDS_S)
