"""`Shoal bulk run`: how far a run has come, when it ends, and what holds it up."""

from __future__ import annotations

from collections.abc import Iterator

from grafana_foundation_sdk.builders.dashboard import Dashboard
from ops.grafana.panels import (
    RATE,
    AnyPanel,
    Query,
    board,
    graph,
    quantile,
    stat_panel,
    total_rate,
)

RUN = 'run=~"$run"'
QUEUE = 'queue=~"$queue"'
MODEL = 'model_name=~"$model"'
BOTH = f"{MODEL}, {QUEUE}"
ROWS = f"sum(shoal_bulk_run_rows{{{RUN}}})"


def bulk_run() -> Dashboard:
    """The dashboard of those who wait for a corpus."""
    return board(
        "Shoal bulk run",
        "shoal-bulk-run",
        "Bulk runs by what they tell of themselves in Redis, and the workers that serve them.",
        ["Progress", *_progress(), "Pace", *_pace(), "What it is made of", *_made_of()],
        variables=(
            ("model", "Model", "label_values(shoal_worker_info, model_name)"),
            ("run", "Run", "label_values(shoal_bulk_run_rows, run)"),
            ("queue", "Queue", 'label_values(shoal_queue_depth{queue=~".*bulk.*"}, queue)'),
        ),
        restarts="",
    )


def _rows(state: str) -> str:
    return f'sum(shoal_bulk_run_rows{{{RUN}, state="{state}"}})'


def _progress() -> Iterator[AnyPanel]:
    yield stat_panel(
        "Done",
        "Share of the selected runs' input rows whose outcome is written (`shoal_bulk_run_rows`), "
        "errors included. A run is here while it runs and for an hour after.",
        f"({_rows('done')} + {_rows('failed')}) / {ROWS}",
        "percentunit",
        anchor="bulk-runs",
        decimals=1,
    )
    yield stat_panel(
        "Ends in",
        "The longest of the selected runs, at its own recent pace "
        "(`shoal_bulk_run_eta_seconds`). Nothing is shown until it has a pace.",
        f"max(shoal_bulk_run_eta_seconds{{{RUN}}})",
        "s",
        anchor="bulk-runs",
    )
    yield stat_panel(
        "Rows done",
        "Input rows with completions (`shoal_bulk_run_rows`, state `done`).",
        _rows("done"),
        "short",
        anchor="bulk-runs",
    )
    yield stat_panel(
        "Rows failed",
        "Input rows with an error instead of completions (`shoal_bulk_run_rows`, state `failed`); "
        "they are in the run's `errors.jsonl`, itself a valid input.",
        _rows("failed"),
        "short",
        anchor="bulk-runs",
        warn=1,
    )
    yield stat_panel(
        "Rows a second",
        "Slope of the rows done and failed (`shoal_bulk_run_rows`). Rows are written in input "
        "order, so one slow row holds back those behind it for a while.",
        f'clamp_min(sum(deriv(shoal_bulk_run_rows{{{RUN}, state=~"done|failed"}}{RATE})), 0)',
        "short",
        anchor="bulk-runs",
        decimals=1,
    )
    yield stat_panel(
        "Kinds of worker",
        "Different fingerprints among the workers (`shoal_worker_info`). A run is bound to its "
        "first worker's: others do not help it, unless it runs with `--mixed`.",
        f"count(count by (fingerprint) (shoal_worker_info{{{MODEL}}})) or vector(0)",
        "none",
        anchor="bulk-runs",
        warn=2,
    )


def _pace() -> Iterator[AnyPanel]:
    yield graph(
        "Rows by state",
        "`shoal_bulk_run_rows`: what is left shrinks as the rest grows.",
        [Query(f"sum by (state) (shoal_bulk_run_rows{{{RUN}}})", "{{state}}")],
        "short",
        anchor="bulk-runs",
        stacked=True,
    )
    yield graph(
        "Ends in, by run",
        "`shoal_bulk_run_eta_seconds`: a line that falls by a second each second is a run on "
        "time; one that rises is slowing down.",
        [Query(f"max by (run) (shoal_bulk_run_eta_seconds{{{RUN}}})", "{{run}}")],
        "s",
        anchor="bulk-runs",
    )
    yield graph(
        "Tokens a second by worker",
        "`shoal_generation_tokens_total` of all queues: the engines do not tell them apart.",
        [Query(total_rate("shoal_generation_tokens_total", MODEL, "instance"), "{{instance}}")],
        "short",
        anchor="engines",
        stacked=True,
    )
    yield graph(
        "Requests waiting",
        "`shoal_queue_requests` of the run's queue. A run keeps a bounded window of its rows "
        "there: an empty queue while rows are left means that the producer is what is slow.",
        [Query(f"sum by (queue) (shoal_queue_requests{{{QUEUE}}})", "{{queue}}")],
        "short",
        anchor="bulk-runs",
        stacked=True,
    )


def _made_of() -> Iterator[AnyPanel]:
    bulk_lane = f'{MODEL}, lane=~"bulk.*"'
    padding = total_rate("shoal_padding_tokens_total", bulk_lane, "phase")
    computed = (
        f"{total_rate('shoal_prompt_tokens_total', bulk_lane)} + "
        f"{total_rate('shoal_generation_tokens_total', bulk_lane)} + "
        f"{total_rate('shoal_padding_tokens_total', bulk_lane)}"
    )
    yield graph(
        "Padding in bulk lanes",
        "Share of token positions computed for nothing, by phase "
        "(`shoal_padding_tokens_total`). It grows when prompts differ much in length and at a "
        "run's end, when slots run empty.",
        [
            Query(
                f"{padding} / ignoring (phase) group_left () clamp_min({computed}, 1e-9)",
                "{{phase}}",
            )
        ],
        "percentunit",
        anchor="batch-efficiency",
        span=8,
        stacked=True,
        top=1,
    )
    yield graph(
        "Tokens of a completion",
        "Median and p95 of tokens generated for a request (`shoal_request_generation_tokens`); "
        "buckets are powers of two, so these are rough.",
        [
            Query(quantile(q, "shoal_request_generation_tokens", BOTH), f"p{100 * q:g}")
            for q in (0.5, 0.95)
        ],
        "short",
        anchor="bulk-runs",
        span=8,
    )
    yield graph(
        "Ends by reason",
        "`shoal_request_success_total` by finish reason: many `length` mean that `--max-tokens` "
        "cuts texts off.",
        [
            Query(
                total_rate("shoal_request_success_total", BOTH, "finished_reason"),
                "{{finished_reason}}",
            )
        ],
        "short",
        anchor="bulk-runs",
        span=8,
        stacked=True,
    )
