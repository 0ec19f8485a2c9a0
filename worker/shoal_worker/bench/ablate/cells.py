"""A row's cells as text, the same in the terminal and in Markdown."""

from __future__ import annotations

from typing import Any, NamedTuple

from shoal_worker.bench.ablate.claims import as_gain
from shoal_worker.bench.ablate.ledger import Ledger, Output, Reading, Row, RungRow
from shoal_worker.bench.ablate.ratios import steps

_MIB = 2**20
_RATES = ("tokens_per_s", "tokenised_per_s")
Line = tuple[str, str, str, str]


class Cells(NamedTuple):
    """One switch, readable."""

    title: str
    amounts: str
    gain: str
    verdict: str
    later: str
    memory: str
    output: str
    default: str

    @staticmethod
    def columns() -> list[tuple[str, dict[str, Any]]]:
        """Their heads, and how rich is to lay them out."""
        right = {"justify": "right"}
        return [
            ("optimisation", {}),
            ("on / off", right),
            ("gain [95%], pairs", right),
            ("", {}),
            ("first, later token", right),
            ("peak memory on / off", right),
            ("output", {}),
            ("default", {}),
        ]

    def texts(self) -> list[str]:
        """In the columns' order."""
        return list(self)


def cells_of(row: Row, ledger: Ledger) -> Cells:
    """A row's, in a ledger that knows how far equal arms are apart."""
    metric, reading = row.main
    gain = row.gain
    verdict = "faster" if gain.ratio > 1 else "slower"
    if not ledger.has_effect(row):
        verdict = "no effect" if gain.is_null else "within the control's noise"
    if not row.evidence:
        verdict += ", nothing differs"
    return Cells(
        title=row.title,
        amounts=f"{_amount(metric, reading.on)} / {_amount(metric, reading.off)} {_unit(metric)}",
        gain=f"{as_gain(gain)}, {len(reading.values)}",
        verdict=verdict,
        later=_later(row.readings),
        memory=_memory(row.readings),
        output=_output(row.output),
        default=row.default or "neither",
    )


def rung_cells(rungs: list[RungRow]) -> list[Line]:
    """Title, tokens/s, factor over the rung before, share of the default."""
    factors = steps([rung.of_default for rung in rungs])
    return [
        (
            rung.title,
            f"{rung.tokens_per_s:,.1f}",
            "" if number == 0 else f"{factor:.2f}",
            f"{rung.of_default:.1%} [{rung.low:.1%}, {rung.high:.1%}]",
        )
        for number, (rung, factor) in enumerate(zip(rungs, factors, strict=True))
    ]


def _amount(metric: str, value: float) -> str:
    if metric in _RATES:
        return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    return f"{value:.2f}"


def _unit(metric: str) -> str:
    return "tok/s" if metric in _RATES else "s"


def _later(readings: dict[str, Reading]) -> str:
    shown = (readings[m].gain(m) for m in ("ttft_s", "inter_token_s") if m in readings)
    return ", ".join("=" if gain.is_null else f"{gain.ratio - 1:+.0%}" for gain in shown)


def _memory(readings: dict[str, Reading]) -> str:
    shown = []
    for metric in ("peak_rss_bytes", "gpu_peak_bytes"):
        if metric in readings:
            reading = readings[metric]
            shown.append(
                f"{reading.on / _MIB:,.0f} / {reading.off / _MIB:,.0f} MiB"
                f" ({reading.ratio - 1:+.0%})"
            )
    return ", GPU ".join(shown)


def _output(output: Output | None) -> str:
    if output is None:
        return ""
    if output.equal is None:
        tokens = "other random numbers" if output.compared else ""
    elif output.equal == output.compared:
        tokens = "same tokens"
    else:
        tokens = f"{output.equal} of {output.compared} equal"
    difference = output.max_logit_difference
    logits = (
        "" if difference is None else f"logits ±{difference:.1g}" if difference else "same logits"
    )
    return ", ".join(text for text in (tokens, logits) if text)
