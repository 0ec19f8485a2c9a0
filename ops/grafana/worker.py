"""`Shoal worker`: one worker from the inside, or several side by side."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders.dashboard import Dashboard
from ops.grafana.panels import (
    RATE,
    AnyPanel,
    Query,
    board,
    graph,
    heat,
    quantile,
    stat_panel,
    total_rate,
)

MODEL = 'model_name=~"$model"'
INSTANCE = 'instance=~"$instance"'
ONE = f"{MODEL}, {INSTANCE}"
PROCESSES = (("", "worker"), ("shoal_engine_", "engine"))


def worker() -> Dashboard:
    """The dashboard for the question why this one is slow."""
    return board(
        "Shoal worker",
        "shoal-worker",
        "One worker from the inside. GPU health is dcgm-exporter's: see its own dashboard.",
        [
            *_now(),
            "Work",
            *_work(),
            "Steps",
            *_steps(),
            "Batch efficiency",
            *_efficiency(),
            "Redis and the process",
            *_process(),
        ],
        variables=(
            ("model", "Model", "label_values(shoal_worker_info, model_name)"),
            ("instance", "Worker", f"label_values(shoal_worker_info{{{MODEL}}}, instance)"),
        ),
        restarts=INSTANCE,
    )


def _now() -> Iterator[AnyPanel]:
    yield stat_panel(
        "Engine up for",
        "Since the engine's process started (`shoal_engine_process_start_time_seconds`), the "
        "youngest of the selected; after a death it starts anew.",
        f"time() - max(shoal_engine_process_start_time_seconds{{{INSTANCE}}})",
        "s",
        anchor="engines",
    )
    yield stat_panel(
        "Running",
        "Sequences in a slot (`shoal_requests_running`).",
        f"sum(shoal_requests_running{{{ONE}}})",
        "none",
        anchor="engines",
    )
    yield stat_panel(
        "Tokens a second",
        "Generated tokens (`shoal_generation_tokens_total`), prompts not counted.",
        total_rate("shoal_generation_tokens_total", ONE),
        "short",
        anchor="engines",
    )
    yield stat_panel(
        "Since the last commit",
        "Seconds since results were last written (`shoal_last_commit_timestamp_seconds`), the "
        "longest of the selected. Long is right when nothing waits.",
        f"max(time() - (shoal_last_commit_timestamp_seconds{{{ONE}}} > 0))",
        "s",
        anchor="engines",
        warn=300,
        bad=1800,
    )
    yield stat_panel(
        "Engine memory",
        "Resident bytes of the engine's process (`shoal_engine_process_resident_memory_bytes`); "
        "a GPU's memory is not in it.",
        f"sum(shoal_engine_process_resident_memory_bytes{{{INSTANCE}}})",
        "bytes",
        anchor="engines",
    )
    yield stat_panel(
        "Model loaded in",
        "Seconds from the engine's start until it could serve (`shoal_model_load_seconds`), "
        "warm-up included; the longest of the selected.",
        f"max(shoal_model_load_seconds{{{ONE}}})",
        "s",
        anchor="engines",
        decimals=1,
    )


def _work() -> Iterator[AnyPanel]:
    yield graph(
        "Sequences",
        "In a slot (`shoal_requests_running`), and claimed without one (`shoal_requests_waiting`).",
        [
            Query(f"sum(shoal_requests_running{{{ONE}}})", "running"),
            Query(f"sum(shoal_requests_waiting{{{ONE}}})", "waiting"),
        ],
        "short",
        anchor="engines",
        stacked=True,
    )
    yield graph(
        "Tokens a second by lane",
        "Generated (`shoal_generation_tokens_total`) and read (`shoal_prompt_tokens_total`).",
        [
            Query(total_rate("shoal_generation_tokens_total", ONE, "lane"), "made in {{lane}}"),
            Query(total_rate("shoal_prompt_tokens_total", ONE, "lane"), "read in {{lane}}"),
        ],
        "short",
        anchor="engines",
    )
    yield graph(
        "Jobs a second",
        "Claimed (`shoal_jobs_claimed_total`) and ended (`shoal_jobs_committed_total`).",
        [
            Query(total_rate("shoal_jobs_claimed_total", ONE), "claimed"),
            Query(total_rate("shoal_jobs_committed_total", ONE, "outcome"), "{{outcome}}"),
        ],
        "short",
        anchor="engines",
    )
    yield graph(
        "KV cache in use",
        "Share of cache positions that hold a live token (`shoal_kv_cache_usage_ratio`).",
        [Query(f"max by (instance) (shoal_kv_cache_usage_ratio{{{ONE}}})", "{{instance}}")],
        "percentunit",
        anchor="batch-efficiency",
        top=1,
    )


def _steps() -> Iterator[AnyPanel]:
    decode, prefill = (f'{ONE}, phase="{phase}"' for phase in ("decode", "prefill"))
    yield graph(
        "Decode step, p95 by lane",
        "`shoal_step_duration_seconds`, since the same lane's step before it: prefills and other "
        "lanes in between are part of it.",
        [Query(quantile(0.95, "shoal_step_duration_seconds", decode, "lane"), "{{lane}}")],
        "s",
        anchor="engines",
        span=8,
    )
    yield graph(
        "Prefill step, p95 by lane",
        "`shoal_step_duration_seconds` of the prefill alone.",
        [Query(quantile(0.95, "shoal_step_duration_seconds", prefill, "lane"), "{{lane}}")],
        "s",
        anchor="engines",
        span=8,
    )
    yield heat(
        "Between tokens",
        "`shoal_inter_token_latency_seconds` of all queues, one observation a token. Two bands "
        "are two lanes, or decodes with and without a prefill before them.",
        Query(f"sum by (le) (rate(shoal_inter_token_latency_seconds_bucket{{{ONE}}}{RATE}))"),
        "s",
        anchor="latency",
        span=8,
    )


def _efficiency() -> Iterator[AnyPanel]:
    yield graph(
        "Slots in use by lane",
        "`shoal_decode_slots_active`, of as many as there are (`shoal_decode_slots_total`).",
        [
            Query(f"sum by (lane) (shoal_decode_slots_active{{{ONE}}})", "{{lane}}"),
            Query(f"sum by (lane) (shoal_decode_slots_total{{{ONE}}})", "there are in {{lane}}"),
        ],
        "short",
        anchor="batch-efficiency",
        span=8,
    )
    yield graph(
        "Padding by lane and phase",
        "Token positions computed for nothing a second (`shoal_padding_tokens_total`).",
        [
            Query(
                total_rate("shoal_padding_tokens_total", ONE, "lane, phase"),
                "{{phase}} in {{lane}}",
            )
        ],
        "short",
        anchor="batch-efficiency",
        span=8,
        stacked=True,
    )
    yield heat(
        "Prompts read together",
        "Rows of prefill steps (`shoal_prefill_batch_rows`).",
        Query(f"sum by (le) (rate(shoal_prefill_batch_rows_bucket{{{ONE}}}{RATE}))"),
        "none",
        anchor="batch-efficiency",
        span=8,
    )


def _process() -> Iterator[AnyPanel]:
    yield graph(
        "Redis round trips, p95",
        "`shoal_redis_round_trip_seconds` by command; a commit carries up to 256 jobs.",
        [
            Query(quantile(0.95, "shoal_redis_round_trip_seconds", ONE, "command"), "{{command}}"),
        ],
        "s",
        anchor="redis",
        span=8,
    )
    yield graph(
        "Processor",
        "Cores in use (`process_cpu_seconds_total`, and the same with `shoal_engine_` before it). "
        "The worker's process is bookkeeping: near a whole core it holds the engine up.",
        [
            Query(
                total_rate(f"{prefix}process_cpu_seconds_total", _of(prefix), "instance"),
                f"{name} of {{{{instance}}}}",
            )
            for prefix, name in PROCESSES
        ],
        "short",
        anchor="engines",
        span=8,
    )
    yield graph(
        "Memory",
        "Resident bytes (`process_resident_memory_bytes`, and the same with `shoal_engine_` "
        "before it). A GPU's memory is not in it.",
        [
            Query(
                f"max by (instance) ({prefix}process_resident_memory_bytes{{{_of(prefix)}}})",
                f"{name} of {{{{instance}}}}",
            )
            for prefix, name in PROCESSES
        ],
        "bytes",
        anchor="engines",
        span=8,
    )


def _of(prefix: str) -> str:
    # Everything that Prometheus scrapes has the plain names: they must not bring others along.
    return INSTANCE if prefix else f'{INSTANCE}, job="shoal-worker"'
