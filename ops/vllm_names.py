"""Which of vLLM's and OpenTelemetry's metric names mean the same as ours, and the rules for vLLM's.

Names are those of vLLM 0.22 and of OpenTelemetry's semantic conventions for generative AI (in
development). Writes `ops/prometheus/recording.yml`; `--check` only compares.
"""

from __future__ import annotations

import sys
from pathlib import Path

RULES = Path(__file__).resolve().parent / "prometheus" / "recording.yml"

# Ours -> vLLM's, and which of our labels vLLM's has not.
VLLM = {
    "shoal_requests_running": ("vllm:num_requests_running", ()),
    "shoal_requests_waiting": ("vllm:num_requests_waiting", ()),
    "shoal_kv_cache_usage_ratio": ("vllm:kv_cache_usage_perc", ()),
    "shoal_request_success_total": ("vllm:request_success_total", ("queue",)),
    "shoal_prompt_tokens_total": ("vllm:prompt_tokens_total", ("lane",)),
    "shoal_generation_tokens_total": ("vllm:generation_tokens_total", ("lane",)),
    "shoal_time_to_first_token_seconds": ("vllm:time_to_first_token_seconds", ("queue",)),
    "shoal_inter_token_latency_seconds": ("vllm:inter_token_latency_seconds", ("queue",)),
    "shoal_e2e_request_latency_seconds": ("vllm:e2e_request_latency_seconds", ("queue",)),
    "shoal_request_queue_time_seconds": ("vllm:request_queue_time_seconds", ("queue",)),
    "shoal_request_prefill_time_seconds": ("vllm:request_prefill_time_seconds", ("queue",)),
    "shoal_request_decode_time_seconds": ("vllm:request_decode_time_seconds", ("queue",)),
    "shoal_request_prompt_tokens": ("vllm:request_prompt_tokens", ("queue",)),
    "shoal_request_generation_tokens": ("vllm:request_generation_tokens", ("queue",)),
}

OPENTELEMETRY = {
    "shoal_time_to_first_token_seconds": "gen_ai.server.time_to_first_token",
    "shoal_inter_token_latency_seconds": "gen_ai.server.time_per_output_token",
    "shoal_e2e_request_latency_seconds": "gen_ai.server.request.duration",
    "shoal_request_prompt_tokens": "gen_ai.client.token.usage (gen_ai.token.type = input)",
    "shoal_request_generation_tokens": "gen_ai.client.token.usage (gen_ai.token.type = output)",
}

HEADER = """\
# Our metrics under vLLM's names, for dashboards made for vLLM. Written by `make dashboards`.
# Not there: preemptions (a claimed request is never preempted) and what is asked for in a request.
groups:
  - name: shoal-as-vllm
    rules:
"""


def is_histogram(name: str) -> bool:
    """Whether one of these metrics is a histogram."""
    return name.endswith("_seconds") or name in {
        "shoal_request_prompt_tokens",
        "shoal_request_generation_tokens",
    }


def rules() -> str:
    """The rules as YAML."""
    lines = []
    for ours, (theirs, dropped) in VLLM.items():
        for part in ("_bucket", "_sum", "_count") if is_histogram(ours) else ("",):
            expr = f"sum without ({', '.join(dropped)}) ({ours}{part})" if dropped else ours
            lines.append(f"      - record: {theirs}{part}\n        expr: {expr}\n")
    return HEADER + "".join(lines)


def main() -> None:
    """Write the rules, or with `--check` fail if they are not current."""
    if "--check" not in sys.argv:
        RULES.write_text(rules(), encoding="utf-8")
    elif RULES.read_text(encoding="utf-8") != rules():
        raise SystemExit(f"{RULES.name} is not current; run `make dashboards`")


if __name__ == "__main__":
    main()
