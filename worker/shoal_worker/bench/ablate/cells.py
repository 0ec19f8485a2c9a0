"""A row's cells as text, the same in the terminal and in Markdown."""

from __future__ import annotations

from typing import Any, NamedTuple

from shoal_worker.bench.ablate.claims import as_gain
from shoal_worker.bench.ablate.ledger import METRICS, Output, Reading, Row, RungRow
from shoal_worker.bench.ablate.ratios import steps

_MIB = 2**20
Line = tuple[str, str, str, str]


class Cells(NamedTuple):
    """One switch, readable."""

    title: str
    on: str
    off: str
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
            ("optimisation", {"overflow": "fold"}),
            ("on", right),
            ("off", right),
            ("gain [95%]", right),
            ("", {}),
            ("first token, later ones", right),
            ("peak memory", right),
            ("output", {}),
            ("default", {}),
        ]

    def texts(self) -> list[str]:
        """In the columns' order."""
        return list(self)


def cells_of(row: Row) -> Cells:
    """A row's."""
    metric, reading = row.main
    gain = row.gain
    pairs = len(reading.values)
    verdict = "no effect" if gain.is_null else "faster" if gain.ratio > 1 else "slower"
    return Cells(
        title=row.title,
        on=_amount(metric, reading.on),
        off=_amount(metric, reading.off),
        gain=f"{as_gain(gain)} ({pairs} pairs)",
        verdict=verdict if row.evidence or row.kind == "loading" else f"{verdict}; nothing differs",
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
    if metric.endswith("_s") and metric not in ("tokens_per_s", "tokenised_per_s"):
        return f"{value:.2f} s" if value >= 1 else f"{value * 1000:.0f} ms"
    return f"{value:,.0f} {'tok/s' if metric.endswith('per_s') else METRICS[metric][1]}"


def _later(readings: dict[str, Reading]) -> str:
    shown = (readings[m].gain(m) for m in ("ttft_s", "inter_token_s") if m in readings)
    return ", ".join("=" if gain.is_null else f"{gain.ratio - 1:+.0%}" for gain in shown)


def _memory(readings: dict[str, Reading]) -> str:
    shown = []
    for metric in ("peak_rss_bytes", "gpu_peak_bytes"):
        if metric in readings:
            reading = readings[metric]
            shown.append(
                f"{reading.on / _MIB:,.0f} / {reading.off / _MIB:,.0f} MiB "
                f"({reading.ratio - 1:+.0%})"
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
