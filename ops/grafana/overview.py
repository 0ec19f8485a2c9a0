"""`Shoal overview`: is all well, what waits, how fast it goes, where time goes, what went wrong."""

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
    instance_table,
    quantile,
    share,
    stat_panel,
    states,
    total_rate,
)

MODEL = 'model_name=~"$model"'
QUEUE = 'queue=~"$queue"'
BOTH = f"{MODEL}, {QUEUE}"

WAITING = f"sum(shoal_queue_requests{{{QUEUE}}})"
DONE = total_rate("shoal_request_success_total", BOTH)
FAILED = total_rate("shoal_requests_failed_total", BOTH)
PADDING = total_rate("shoal_padding_tokens_total", MODEL)
# A prefill makes its rows' first tokens without a position of their own.
USEFUL = (
    f"({total_rate('shoal_prompt_tokens_total', MODEL)} + "
    f"{total_rate('shoal_generation_tokens_total', MODEL)} - "
    f"{total_rate('shoal_prefill_batch_rows_sum', MODEL)})"
)
OCCUPANCY = f"sum(shoal_decode_slots_active{{{MODEL}}}) / sum(shoal_decode_slots_total{{{MODEL}}})"


def overview() -> Dashboard:
    """The dashboard that stays open."""
    return board(
        "Shoal overview",
        "shoal-overview",
        "The queue beside the engines. Every panel's description names its metric and its caveat.",
        [
            *_now(),
            "Queue (left) and engines (right)",
            *_queue_and_engines(),
            "Latency",
            *_latency(),
            "Batch efficiency",
            *_efficiency(),
            "Reliability",
            *_reliability(),
            "Workers",
            _workers(),
        ],
        variables=(
            ("model", "Model", "label_values(shoal_worker_info, model_name)"),
            ("queue", "Queue", "label_values(shoal_queue_depth, queue)"),
        ),
        restarts="",
    )


def _now() -> Iterator[AnyPanel]:
    yield stat_panel(
        "Workers up",
        "Workers that Prometheus reached and whose model is loaded (`shoal_worker_info`). One that "
        "still loads is missing here and counted as `starting` in `shoal_workers`.",
        f"count(shoal_worker_info{{{MODEL}}}) or vector(0)",
        "none",
        anchor="queues",
        bad=1,
        low_is_bad=True,
    )
    yield stat_panel(
        "Requests waiting",
        "Requests in jobs that no worker has claimed (`shoal_queue_requests`); in a queue of over "
        "512 jobs estimated from its two ends.",
        WAITING,
        "short",
        anchor="queues",
    )
    yield stat_panel(
        "Oldest waits for",
        "Age of the job that is next in line (`shoal_queue_oldest_age_seconds`), the largest of "
        "the queues. For bulk queues minutes or hours are as they should be: select a queue.",
        f"max(shoal_queue_oldest_age_seconds{{{QUEUE}}})",
        "s",
        anchor="queues",
        warn=30,
        bad=300,
    )
    yield stat_panel(
        "Drained in",
        "Waiting requests (`shoal_queue_requests`) by the rate at which requests end now. What "
        "still arrives is not in it, and the last ones take longer. Infinite while nothing ends.",
        f"({WAITING} / ({DONE} + {FAILED}) >= 0) or {WAITING}",
        "s",
        anchor="queues",
    )
    yield stat_panel(
        "Tokens a second",
        "Generated tokens (`shoal_generation_tokens_total`), prompts not counted.",
        total_rate("shoal_generation_tokens_total", MODEL),
        "short",
        anchor="engines",
    )
    yield stat_panel(
        "Rows a second",
        "Completions (`shoal_request_success_total`): a request with n samples counts n.",
        DONE,
        "short",
        anchor="engines",
        decimals=1,
    )
    yield stat_panel(
        "Failure share",
        "Failed requests of all that ended (`shoal_requests_failed_total`), refused ones such as "
        "too long prompts included. Whole jobs that failed are under Reliability.",
        share(FAILED, f"({FAILED} + {DONE})"),
        "percentunit",
        anchor="reliability",
        warn=0.01,
        bad=0.05,
    )
    yield stat_panel(
        "p95 to first token",
        "From submission to the first token (`shoal_time_to_first_token_seconds`), time in the "
        "queue included; counted when a request ends. A quantile is as fine as its buckets.",
        quantile(0.95, "shoal_time_to_first_token_seconds", BOTH),
        "s",
        anchor="latency",
        warn=5,
        bad=30,
    )
    yield stat_panel(
        "p95 between tokens",
        "From token to token of a sequence (`shoal_inter_token_latency_seconds`), prefills and "
        "other lanes in between included; a step of several tokens is spread over them.",
        quantile(0.95, "shoal_inter_token_latency_seconds", BOTH),
        "s",
        anchor="latency",
        warn=0.2,
        bad=0.5,
    )
    yield stat_panel(
        "Slots in use",
        "Share of decode slots that hold a sequence (`shoal_decode_slots_active`), over all "
        "lanes. A lane in which nothing runs costs nothing, so this can be low in good order.",
        OCCUPANCY,
        "percentunit",
        anchor="batch-efficiency",
    )
    yield stat_panel(
        "Padding share",
        "Token positions computed for nothing (`shoal_padding_tokens_total`): ends of prompts in "
        "a prefill, idle slots in a decode. High with few requests, whatever the settings.",
        share(PADDING, f"({PADDING} + {USEFUL})"),
        "percentunit",
        anchor="batch-efficiency",
        warn=0.5,
        bad=0.9,
    )
    yield stat_panel(
        "KV cache in use",
        "Share of cache positions that hold a live token (`shoal_kv_cache_usage_ratio`), mean of "
        "the workers. The cache is there whether used or not: it never runs out in mid-run.",
        f"avg(shoal_kv_cache_usage_ratio{{{MODEL}}})",
        "percentunit",
        anchor="batch-efficiency",
    )


def _queue_and_engines() -> Iterator[AnyPanel]:
    claimed = total_rate("shoal_jobs_claimed_total", BOTH, "queue")
    growth = f"sum by (queue) (deriv(shoal_queue_depth{{{QUEUE}}}{RATE}))"
    yield graph(
        "Requests waiting by queue",
        "`shoal_queue_requests`; in a queue of over 512 jobs estimated from its two ends.",
        [Query(f"sum by (queue) (shoal_queue_requests{{{QUEUE}}})", "{{queue}}")],
        "short",
        anchor="queues",
        stacked=True,
    )
    yield graph(
        "Tokens a second by worker",
        "`shoal_generation_tokens_total`. A worker that makes fewer than its peers has other "
        "hardware, other requests, or trouble.",
        [Query(total_rate("shoal_generation_tokens_total", MODEL, "instance"), "{{instance}}")],
        "short",
        anchor="engines",
        stacked=True,
    )
    yield graph(
        "Jobs in and out",
        "Claims (`shoal_jobs_claimed_total`), and arrivals as claims plus the growth of "
        "`shoal_queue_depth`: jobs given back or run again count as arrivals too.",
        [
            Query(f"clamp_min({growth} + {claimed}, 0)", "arrive in {{queue}}"),
            Query(claimed, "claimed from {{queue}}"),
        ],
        "short",
        anchor="queues",
    )
    yield graph(
        "Sequences in the engines",
        "In a slot (`shoal_requests_running`), and claimed without one "
        "(`shoal_requests_waiting`); a few of the latter keep slots full.",
        [
            Query(f"sum(shoal_requests_running{{{MODEL}}})", "running"),
            Query(f"sum(shoal_requests_waiting{{{MODEL}}})", "waiting"),
            Query(f"sum(shoal_decode_slots_total{{{MODEL}}})", "slots there are"),
        ],
        "short",
        anchor="engines",
    )
    yield heat(
        "Time in queue",
        "From submission to the first prefill (`shoal_request_queue_time_seconds`), counted when "
        "a request ends.",
        Query(f"sum by (le) (rate(shoal_request_queue_time_seconds_bucket{{{BOTH}}}{RATE}))"),
        "s",
        anchor="queues",
    )
    yield graph(
        "Where a request's time goes",
        "Mean seconds a request spent in the queue, in prefill and in decode "
        "(`shoal_request_queue_time_seconds` and its siblings), of those that ended.",
        [
            Query(_mean(f"shoal_request_{phase}_time_seconds"), phase)
            for phase in ("queue", "prefill", "decode")
        ],
        "s",
        anchor="engines",
        stacked=True,
    )


def _mean(metric: str) -> str:
    count = total_rate(f"{metric}_count", BOTH)
    return f"{total_rate(f'{metric}_sum', BOTH)} / ({count} > 0)"


def _latency() -> Iterator[AnyPanel]:
    for title, metric, caveat, limit in (
        (
            "To first token",
            "shoal_time_to_first_token_seconds",
            "From submission, time in the queue included; counted when a request ends.",
            5,
        ),
        (
            "Between tokens",
            "shoal_inter_token_latency_seconds",
            "One observation a token of decode steps, counted as it is made.",
            0.2,
        ),
        (
            "To the result",
            "shoal_e2e_request_latency_seconds",
            "From submission; grows with the tokens asked for. Requests with errors are left out.",
            30,
        ),
    ):
        yield graph(
            title,
            f"`{metric}`. {caveat} Quantiles are as fine as the buckets.",
            [
                *(Query(quantile(q, metric, BOTH), f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)),
                Query(_mean(metric), "mean"),
            ],
            "s",
            anchor="latency",
            span=8,
            limit=limit,
        )


def _efficiency() -> Iterator[AnyPanel]:
    yield graph(
        "Token positions computed",
        "Positions that did work and positions that did not, by phase: "
        "`shoal_prompt_tokens_total`, `shoal_generation_tokens_total`, "
        "`shoal_padding_tokens_total`.",
        [
            Query(total_rate("shoal_prompt_tokens_total", MODEL), "prompt tokens"),
            Query(total_rate("shoal_generation_tokens_total", MODEL), "generated tokens"),
            Query(total_rate("shoal_padding_tokens_total", MODEL, "phase"), "padding in {{phase}}"),
        ],
        "short",
        anchor="batch-efficiency",
        stacked=True,
    )
    yield graph(
        "Slots in use by lane",
        "`shoal_decode_slots_active` of `shoal_decode_slots_total`. A lane that is short of slots "
        "while another idles is a matter of `--lanes`.",
        [
            Query(
                f"sum by (lane) (shoal_decode_slots_active{{{MODEL}}}) / "
                f"sum by (lane) (shoal_decode_slots_total{{{MODEL}}})",
                "{{lane}}",
            )
        ],
        "percentunit",
        anchor="batch-efficiency",
        top=1,
    )
    rows = "shoal_prefill_batch_rows"
    yield graph(
        "Prompts read together",
        "Mean rows of a prefill step (`shoal_prefill_batch_rows`). One at a time is right when "
        "requests come one at a time.",
        [
            Query(
                f"{total_rate(f'{rows}_sum', MODEL, 'lane')} / "
                f"({total_rate(f'{rows}_count', MODEL, 'lane')} > 0)",
                "{{lane}}",
            )
        ],
        "short",
        anchor="batch-efficiency",
    )
    yield graph(
        "Shape-cache misses",
        "Steps that were the first in their shape (`shoal_shape_cache_misses_total`): each is "
        "slow. After a start with `--warm-up` there is none.",
        [
            Query(
                f"sum by (instance) (increase(shoal_shape_cache_misses_total{{{MODEL}}}{RATE}))",
                "{{instance}}",
            )
        ],
        "short",
        anchor="batch-efficiency",
        bars=True,
    )


def _reliability() -> Iterator[AnyPanel]:
    def grown(metric: str, selector: str) -> str:
        return f"sum(increase({metric}{{{selector}}}{RATE}))"

    yield graph(
        "Jobs that took another way",
        "Given back (`shoal_jobs_retried_total`), taken over from a dead worker "
        "(`shoal_jobs_abandoned_total`), commits refused since the job was not the worker's any "
        "more (`shoal_commits_fenced_total`), failed for good. None of the first three is a loss.",
        [
            Query(grown("shoal_jobs_retried_total", BOTH), "given back"),
            Query(grown("shoal_jobs_abandoned_total", BOTH), "taken over"),
            Query(grown("shoal_commits_fenced_total", BOTH), "fenced commits"),
            Query(grown("shoal_jobs_committed_total", f'{BOTH}, outcome="failed"'), "failed"),
        ],
        "short",
        anchor="reliability",
        bars=True,
    )
    yield graph(
        "Failed requests by code",
        "`shoal_requests_failed_total`. `prompt_too_long`, `invalid_request` and "
        "`model_mismatch` are their senders'; `killed_engine` and `internal_error` are ours.",
        [Query(total_rate("shoal_requests_failed_total", BOTH, "code"), "{{code}}")],
        "short",
        anchor="reliability",
        stacked=True,
    )
    yield graph(
        "Engine deaths",
        "Engine processes that ended unasked (`shoal_engine_deaths_total`), and batches split in "
        "halves for want of memory (`shoal_oom_splits_total`).",
        [
            Query(grown("shoal_engine_deaths_total", MODEL), "deaths"),
            Query(grown("shoal_oom_splits_total", MODEL), "splits for memory"),
        ],
        "short",
        anchor="reliability",
        bars=True,
    )
    yield graph(
        "Dead letters",
        "Failed jobs that RQ keeps, for a week if Shoal sent them (`shoal_dead_letter_jobs`).",
        [Query(f"sum by (queue) (shoal_dead_letter_jobs{{{QUEUE}}})", "{{queue}}")],
        "short",
        anchor="reliability",
        stacked=True,
    )
    yield states(
        "Redis",
        "Whether Redis answers the exporter, writes an append-only file, and whether its last "
        "writes to disk succeeded (`shoal_redis_up`, `shoal_redis_aof_enabled`, "
        "`shoal_redis_aof_ok`, `shoal_redis_snapshot_ok`). Without the file a crash loses jobs.",
        [
            Query("min(shoal_redis_up)", "answers"),
            Query("min(shoal_redis_aof_enabled)", "append-only file"),
            Query("min(shoal_redis_aof_ok)", "its writes"),
            Query("min(shoal_redis_snapshot_ok)", "snapshots"),
        ],
        anchor="redis",
        span=6,
    )
    yield graph(
        "Redis memory",
        "`shoal_redis_memory_used_bytes` and its limit (`shoal_redis_memory_max_bytes`, 0: none). "
        "A full Redis takes no new jobs; what it holds is kept.",
        [
            Query("max(shoal_redis_memory_used_bytes)", "used"),
            Query("max(shoal_redis_memory_max_bytes)", "limit"),
        ],
        "bytes",
        anchor="redis",
        span=6,
    )
    yield graph(
        "Redis round trips, p95",
        "`shoal_redis_round_trip_seconds` by command, as workers see it; failed ones included.",
        [Query(quantile(0.95, "shoal_redis_round_trip_seconds", MODEL, "command"), "{{command}}")],
        "s",
        anchor="redis",
        span=6,
    )
    yield graph(
        "Redis errors",
        "Failed exchanges of the workers with Redis (`shoal_redis_errors_total`). Nothing is lost "
        "by one: it is tried again, and results are kept meanwhile.",
        [
            Query(
                f"sum by (command) (increase(shoal_redis_errors_total{{{MODEL}}}{RATE}))",
                "{{command}}",
            )
        ],
        "short",
        anchor="redis",
        bars=True,
        span=6,
    )


def _workers() -> AnyPanel:
    def worst(metric: str) -> str:
        return f"max by (instance) ({metric})"

    return instance_table(
        "Workers",
        "Each worker as Prometheus sees it (`shoal_worker_info` and others). Different "
        "fingerprints generate different text from the same seed; a bulk run is bound to one.",
        [
            Query(f"shoal_worker_info{{{MODEL}}}", "info"),
            Query(total_rate("shoal_generation_tokens_total", MODEL, "instance"), "tokens/s"),
            Query(f"sum by (instance) (shoal_requests_running{{{MODEL}}})", "running"),
            Query(
                worst(f"time() - (shoal_last_commit_timestamp_seconds{{{MODEL}}} > 0)"),
                "seconds since commit",
            ),
            Query(worst("shoal_engine_process_resident_memory_bytes"), "engine bytes"),
            Query(worst(f"shoal_model_load_seconds{{{MODEL}}}"), "load seconds"),
        ],
        anchor="engines",
        hidden=("Time", "Value #A", "__name__", "job", *(f"Time {i}" for i in range(1, 7))),
    )
