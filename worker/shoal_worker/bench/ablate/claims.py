"""Claimed figures beside measured ones."""

from __future__ import annotations

from collections.abc import Iterable

from shoal_worker.bench.ablate.ledger import MAIN_METRIC, METRICS, ClaimRow, Reading
from shoal_worker.bench.ablate.ratios import Interval, verdict
from shoal_worker.bench.ablate.switch import Claim

# One process's peak moves by so much from run to run: less is no finding.
_MEMORY_NOISE = 0.01
_MEMORY_METRICS = ("gpu_peak_bytes", "peak_rss_bytes")


def claim_rows(
    claims: Iterable[Claim], readings: dict[str, Reading], facts: dict[str, str]
) -> list[ClaimRow]:
    """Each claim with what was measured of it; one about what was not measured is left out."""
    rows = (_claim_row(claim, readings, facts) for claim in claims)
    return [row for row in rows if row is not None]


def _claim_row(
    claim: Claim, readings: dict[str, Reading], facts: dict[str, str]
) -> ClaimRow | None:
    if claim.metric in facts:
        value = float(facts[claim.metric])
        agrees = claim.low <= value <= claim.high
        measured = f"{value / 1000:.1f} KB"
        return ClaimRow(
            text=claim.text,
            range=None,
            measured=measured,
            verdict="as claimed" if agrees else "of another model or dtype",
        )
    metric = claim.metric
    if metric == "peak_bytes":
        metric = next((name for name in _MEMORY_METRICS if name in readings), metric)
    if metric not in readings:
        return None
    gain = readings[metric].gain(metric)
    if metric in _MEMORY_METRICS:
        noise = _MEMORY_NOISE
        gain = Interval(gain.ratio, gain.low * (1 - noise), gain.high * (1 + noise))
        saved = 1 - 1 / gain.ratio
        measured = f"{saved:.0%} less {METRICS[metric][1]}" if saved >= 0 else f"{-saved:.0%} more"
    else:
        measured = as_gain(gain)
    return ClaimRow(
        text=claim.text,
        range=(claim.low, claim.high) if metric in MAIN_METRIC.values() else None,
        measured=measured,
        verdict=verdict(gain, claim.low, claim.high),
    )


def as_gain(gain: Interval) -> str:
    """Such as "+12% [+9%, +14%]", or "5.2× [5.0, 5.4]" from twice on."""
    if gain.ratio >= 2 or gain.ratio <= 0.5:
        return f"{gain.ratio:.2f}× [{gain.low:.2f}, {gain.high:.2f}]"
    ratio, low, high = (f"{number - 1:+.1%}" for number in gain)
    return f"{ratio} [{low}, {high}]"
