"""Metrics: which event moves what, what stands at 0, and that Prometheus accepts all of it."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest

import shoal_worker
from shoal_worker.events import (
    EngineDied,
    EngineLoaded,
    EngineState,
    Event,
    JobsMoved,
    RedisRoundTrip,
    RequestEnded,
    StepRun,
)
from shoal_worker.metrics import (
    ERROR_CODES,
    LATENCY_BOUNDS_S,
    REDIS_COMMANDS,
    PrometheusMetrics,
)

LANE = "bulk-32x256"
BULK = "shoal-bulk"
QUEUES = ("shoal-high", "shoal-default", BULK)

# The worker's stems in the public interface: a rename here breaks users' dashboards.
STEMS = {
    *("requests_running", "requests_waiting", "request_success_total", "requests_failed_total"),
    *("prompt_tokens_total", "generation_tokens_total", "padding_tokens_total"),
    *("time_to_first_token_seconds", "inter_token_latency_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds"),
    *("request_prefill_time_seconds", "request_decode_time_seconds"),
    *("request_prompt_tokens", "request_generation_tokens", "prefill_batch_rows"),
    *("decode_slots_active", "decode_slots_total", "kv_cache_usage_ratio"),
    *("shape_cache_misses_total", "step_duration_seconds", "jobs_claimed_total"),
    *("jobs_committed_total", "jobs_retried_total", "jobs_abandoned_total"),
    *("commits_fenced_total", "oom_splits_total", "redis_errors_total"),
    *("redis_round_trip_seconds", "model_load_seconds", "last_commit_timestamp_seconds"),
    "worker_info",
}
# Ours alone, and so free to change.
MORE_STEMS = {"engine_deaths_total"}

DECODE = StepRun(
    *("decode", LANE),
    rows=24,
    slots=32,
    tokens=24,
    padding_tokens=8,
    duration_s=0.0018,
    tokens_by_queue=((BULK, 24),),
)
PREFILL = StepRun("prefill", LANE, rows=3, slots=4, tokens=90, padding_tokens=38, duration_s=0.0041)
ENDED = RequestEnded(
    queue=BULK,
    finish_reasons=("length",),
    error_code=None,
    prompt_tokens=30,
    completion_tokens=64,
    queue_s=4.0,
    prefill_s=0.004,
    decode_s=0.12,
    ttft_s=4.004,
    e2e_s=4.2,
)
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

    def series(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if not sample.name.endswith("_created")
        }


@pytest.fixture
def observed() -> Observed:
    return Observed({LANE: 32})


def move_everything(observed: Observed) -> None:
    observed(LOADED, STATE, PREFILL, DECODE, ENDED)
    for code in ERROR_CODES:
        observed(dataclasses.replace(ENDED, error_code=code))
    observed(JobsMoved("claimed", BULK, 9), JobsMoved("committed", BULK, 4))
    observed(JobsMoved("failed", BULK, 1), JobsMoved("retried", BULK, 2))
    observed(JobsMoved("abandoned", BULK, 1), JobsMoved("fenced", BULK, 1))
    for command in REDIS_COMMANDS:
        observed(RedisRoundTrip(command, 0.0004), RedisRoundTrip(command, 5.0, failed=True))
    observed(EngineDied(out_of_memory=True, was_split=True))


def test_the_names_are_those_of_the_public_interface(observed: Observed) -> None:
    move_everything(observed)

    # A counter's family is called without `_total`.
    names = {
        f"{family.name}_total" if family.type == "counter" else family.name
        for family in observed.registry.collect()
    }

    assert names == {f"shoal_{stem}" for stem in STEMS | MORE_STEMS}


def test_every_family_explains_itself_and_every_series_names_the_model(observed: Observed) -> None:
    move_everything(observed)

    for family in observed.registry.collect():
        assert family.documentation.endswith("."), family.name
        assert all(sample.labels["model_name"] == "gpt2" for sample in family.samples)


def test_times_are_explained_in_seconds(observed: Observed) -> None:
    times = [f for f in observed.registry.collect() if f.name.endswith("_seconds")]

    texts = {family.name: family.documentation for family in times}
    del texts["shoal_last_commit_timestamp_seconds"]  # It is a Unix time.

    assert [name for name, text in texts.items() if not text.startswith("Seconds ")] == []


def test_events_bring_no_series_that_was_not_there_at_0(observed: Observed) -> None:
    before = observed.series()

    move_everything(observed)

    fresh = {name for name, _ in observed.series().keys() - before.keys()}
    assert fresh == {"shoal_worker_info"}  # What it says is only known when the engine is loaded.
    slots = {("shoal_decode_slots_total", _labels(lane=LANE)): 32.0}
    assert {key: value for key, value in before.items() if value} == slots


def test_a_request_is_timed_under_its_queue_alone(observed: Observed) -> None:
    observed(ENDED)

    for stem, seconds in {
        "time_to_first_token_seconds": 4.004,
        "e2e_request_latency_seconds": 4.2,
        "request_queue_time_seconds": 4.0,
        "request_prefill_time_seconds": 0.004,
        "request_decode_time_seconds": 0.12,
    }.items():
        assert observed.value(f"{stem}_sum", queue=BULK) == pytest.approx(seconds)
        assert observed.value(f"{stem}_count", queue="shoal-high") == 0
    assert observed.value("request_prompt_tokens_sum", queue=BULK) == 30
    assert observed.value("request_generation_tokens_sum", queue=BULK) == 64


def test_each_sample_of_a_request_counts_by_its_own_finish_reason(observed: Observed) -> None:
    observed(dataclasses.replace(ENDED, finish_reasons=("stop", "stop", "length")))

    success = "request_success_total"
    assert observed.value(success, queue=BULK, finished_reason="stop") == 2
    assert observed.value(success, queue=BULK, finished_reason="length") == 1
    assert observed.value(success, queue=BULK, finished_reason="deadline") == 0
    assert observed.value("e2e_request_latency_seconds_count", queue=BULK) == 1


def test_a_refused_request_is_a_failure_and_no_latency(observed: Observed) -> None:
    observed(dataclasses.replace(ENDED, finish_reasons=(), error_code="prompt_too_long", e2e_s=0))

    assert observed.value("requests_failed_total", queue=BULK, code="prompt_too_long") == 1
    assert observed.value("e2e_request_latency_seconds_count", queue=BULK) == 0


def test_an_error_code_met_for_the_first_time_is_counted(observed: Observed) -> None:
    observed(dataclasses.replace(ENDED, finish_reasons=(), error_code="brand_new"))

    assert observed.value("requests_failed_total", queue=BULK, code="brand_new") == 1


def test_a_request_without_a_token_has_no_time_to_its_first(observed: Observed) -> None:
    observed(dataclasses.replace(ENDED, finish_reasons=("deadline",), ttft_s=None))

    assert observed.value("time_to_first_token_seconds_count", queue=BULK) == 0
    assert observed.value("request_prefill_time_seconds_count", queue=BULK) == 0
    assert observed.value("e2e_request_latency_seconds_count", queue=BULK) == 1


@pytest.mark.parametrize(
    ("kind", "stem", "labels"),
    [
        ("claimed", "jobs_claimed_total", {}),
        ("committed", "jobs_committed_total", {"outcome": "finished"}),
        ("failed", "jobs_committed_total", {"outcome": "failed"}),
        ("cancelled", "jobs_committed_total", {"outcome": "cancelled"}),
        ("retried", "jobs_retried_total", {}),
        ("abandoned", "jobs_abandoned_total", {}),
        ("fenced", "commits_fenced_total", {}),
    ],
)
def test_jobs_that_move_are_counted_where_they_went(
    observed: Observed, kind: str, stem: str, labels: dict[str, str]
) -> None:
    before = observed.series()

    observed(JobsMoved(kind, BULK, 3))  # type: ignore[arg-type]  # Parametrised literals are strings.

    moved = {key for key, value in observed.series().items() if value != before[key]}
    moved -= {("shoal_last_commit_timestamp_seconds", _labels())}
    assert moved == {(f"shoal_{stem}", _labels(queue=BULK, **labels))}
    assert observed.value(stem, queue=BULK, **labels) == 3


def test_the_last_commit_has_a_time_and_a_refused_one_has_none(observed: Observed) -> None:
    observed(JobsMoved("fenced", BULK, 1))
    assert observed.value("last_commit_timestamp_seconds") == 0

    before_s = time.time()
    observed(JobsMoved("committed", BULK, 1))
    committed_s = observed.value("last_commit_timestamp_seconds")

    assert committed_s is not None
    assert before_s <= committed_s <= time.time()


def test_a_failed_exchange_with_redis_is_an_error_and_is_timed_apart(observed: Observed) -> None:
    observed(RedisRoundTrip("commit", 0.0004), RedisRoundTrip("commit", 5.0, failed=True))

    name = "redis_round_trip_seconds_sum"
    assert observed.value(name, command="commit", outcome="ok") == pytest.approx(0.0004)
    assert observed.value(name, command="commit", outcome="error") == 5.0
    assert observed.value("redis_errors_total", command="commit") == 1


def test_every_plausible_objective_has_a_bucket_of_its_own() -> None:
    assert {0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 300.0, 600.0} <= set(LATENCY_BOUNDS_S)


def test_series_stay_few_enough_for_many_workers(observed: Observed) -> None:
    move_everything(observed)

    assert len(observed.series()) < 1_000


def test_every_code_and_command_that_the_worker_knows_stands_at_0() -> None:
    source = "".join(path.read_text() for path in Path(shoal_worker.__file__).parent.glob("*.py"))

    codes = set(re.findall(r'_answer_error\([^)]*?, "(\w+)", ', source))
    codes |= set(re.findall(r'code = "(\w+)" if .* else "(\w+)"', source)[0])
    codes |= set(re.findall(r'KILLED_ENGINE = "(\w+)"', source))
    commands = set(re.findall(r'\.timed\("(\w+)"', source))

    assert codes == set(ERROR_CODES)
    assert commands | {"look", "renew"} == set(REDIS_COMMANDS)


@pytest.mark.server
def test_promtool_accepts_the_exposition(observed: Observed) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        assert os.environ.get("CI") != "true", "CI must have promtool (Debian: prometheus)"
        pytest.skip("promtool is not installed (Debian: prometheus)")
    move_everything(observed)

    checked = subprocess.run(
        [promtool, "check", "metrics"],
        input=generate_latest(observed.registry),
        capture_output=True,
        check=False,
    )

    # The one lint is the price of a name in the public interface.
    complaints = (checked.stdout + checked.stderr).decode().splitlines()
    assert complaints == [
        'shoal_decode_slots_total non-counter metrics should not have "_total" suffix'
    ]


def _labels(**labels: str) -> frozenset[tuple[str, str]]:
    return frozenset({"model_name": "gpt2", **labels}.items())
