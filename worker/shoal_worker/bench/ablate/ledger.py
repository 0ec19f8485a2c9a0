"""What was measured: the JSON that is committed, shown and added to."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from shoal.errors import InvalidRequest
from shoal.validation import explain
from shoal_worker.bench.ablate.ratios import Interval

# Whether more is better, and how it is called.
METRICS: dict[str, tuple[bool, str]] = {
    "tokens_per_s": (True, "tokens/s"),
    "ttft_s": (False, "time to first token"),
    "inter_token_s": (False, "time between later tokens"),
    "load_s": (False, "load time"),
    "tokenised_per_s": (True, "tokens tokenised a second"),
    "peak_rss_bytes": (False, "peak RSS"),
    "gpu_peak_bytes": (False, "GPU peak"),
}
CONTROL = "control"
MAIN_METRIC = {"serving": "tokens_per_s", "loading": "load_s", "tokenising": "tokenised_per_s"}


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Reading(_Record):
    """One metric of both arms.

    Attributes:
        on, off: medians.
        ratio, low, high: of on / off over pairs; without an interval where there was one pair.
        values: on and off of each pair.
    """

    on: float
    off: float
    ratio: float
    low: float
    high: float
    values: list[tuple[float, float]]

    def gain(self, metric: str) -> Interval:
        """Over 1 where on is better: faster, sooner or smaller."""
        interval = Interval(self.ratio, self.low, self.high)
        return interval if METRICS[metric][0] else interval.inverted()


class Output(_Record):
    """Whether both arms made the same.

    Attributes:
        equal, compared: completions; None where other random numbers were drawn.
        max_logit_difference: after equal tokens; None where logits were not compared.
    """

    equal: int | None
    compared: int
    max_logit_difference: float | None


class ClaimRow(_Record):
    """A claim beside what was measured.

    Attributes:
        range: the gain claimed, where it is of the row's main metric.
    """

    text: str
    range: tuple[float, float] | None
    measured: str
    verdict: str


class Row(_Record):
    """One switch.

    Attributes:
        default: which arm `shoal worker` is.
        readings: by metric; the main one first.
        evidence: what differs countably, such as operators launched.
    """

    name: str
    title: str
    kind: Literal["serving", "loading", "tokenising"]
    on_text: str
    off_text: str
    setting: str | None
    default: Literal["on", "off"] | None
    readings: dict[str, Reading]
    output: Output | None
    evidence: str
    claims: list[ClaimRow]

    @property
    def main(self) -> tuple[str, Reading]:
        """The metric that the row is about, and its reading."""
        metric = MAIN_METRIC[self.kind]
        return metric, self.readings[metric]

    @property
    def gain(self) -> Interval:
        """Of the main metric, over 1 where on is better."""
        metric, reading = self.main
        return reading.gain(metric)


class RungRow(_Record):
    """One rung of the waterfall.

    Attributes:
        of_default, low, high: its speed as a share of the default's, which ran next to it.
    """

    title: str
    tokens_per_s: float
    of_default: float
    low: float
    high: float
    pairs: int


class Header(_Record):
    """Where and of what a ledger is; rows of two headers are never in one."""

    hardware: str
    device: str
    threads: int | None
    model: str
    dtype: str
    versions: dict[str, str]
    load: str
    quick: bool


class Ledger(_Record):
    """All rows.

    Attributes:
        commands: what was run, with its date.
        not_here: titles of switches that do nothing on this device, with the reason.
    """

    header: Header
    commands: list[str]
    rows: list[Row]
    waterfall: list[RungRow]
    not_here: dict[str, str]

    def has_effect(self, row: Row) -> bool:
        """Whether a row's gain is more than chance, and than how far the two controls are apart."""
        if row.gain.is_null:
            return False
        controls = [one.gain for one in self.rows if one.name == CONTROL and row.kind == one.kind]
        noise = max((max(gain.high, 1 / gain.low) for gain in controls), default=1.0)
        return not 1 / noise <= row.gain.ratio <= noise

    def with_rows(self, other: Ledger, order: list[str]) -> Ledger:
        """This one with another's rows added, or in place of its own, in order.

        Raises:
            InvalidRequest: the other is of another machine, model, version or load.
        """
        if self.header != other.header:
            mine, its = self.header.model_dump(), other.header.model_dump()
            name = next(name for name in mine if mine[name] != its[name])
            raise InvalidRequest(
                f"the ledger's {name} is {mine[name]!r} and this run's is {its[name]!r}; "
                "name another file, or measure all of it anew"
            )
        rows = {row.name: row for row in (*self.rows, *other.rows)}
        return Ledger(
            header=self.header,
            commands=list(dict.fromkeys((*self.commands, *other.commands))),
            rows=sorted(rows.values(), key=lambda row: order.index(row.name)),
            waterfall=other.waterfall or self.waterfall,
            not_here=self.not_here | other.not_here,
        )


def read_ledger(path: Path) -> Ledger:
    """A ledger that was written before.

    Raises:
        InvalidRequest: the file is no ledger.
    """
    try:
        return Ledger.model_validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = explain(error, Ledger) if isinstance(error, ValidationError) else str(error)
        raise InvalidRequest(f"{path} is no ledger of shoal bench ablate: {reason}") from None
