"""What a switch is: two arms, on and off, and what is claimed of them. Pure data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shoal_worker.bench.ablate.arms import DEFAULT, Arm

Kind = Literal["serving", "loading", "tokenising"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What write-ups say.

    Attributes:
        metric: a name in `ledger.METRICS`, or a fact of the model.
        low, high: the gain as a factor, over 1 for faster or smaller; for a fact, its value.
    """

    text: str
    metric: str
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Switch:
    """One optimisation.

    Attributes:
        name: for `--only`.
        on, off: the arms; at most one of them is the default.
        on_text, off_text: what each does.
        setting: of `shoal worker`, where it is one; else it is in the benchmark alone.
        only_on: the kind of device that has it; None: all.
    """

    name: str
    title: str
    on: Arm
    off: Arm
    on_text: str
    off_text: str
    kind: Kind = "serving"
    setting: str | None = None
    only_on: Device | None = None
    claims: tuple[Claim, ...] = ()

    @property
    def default(self) -> Literal["on", "off"] | None:
        """Which of them `shoal worker` does by itself; None where it does neither."""
        if self.on == DEFAULT:
            return "on"
        return "off" if self.off == DEFAULT else None


def of_setting(
    name: str,
    title: str,
    setting: str,
    *,
    on_text: str,
    off_text: str,
    on: Any = None,
    off: Any = None,
    base: Arm = DEFAULT,
    only_on: Device | None = None,
    claims: tuple[Claim, ...] = (),
) -> Switch:
    """A setting of the worker's: None stands for its default."""
    arm_on, arm_off = (
        base if value is None else base.with_settings(**{setting: value}) for value in (on, off)
    )
    return Switch(
        name,
        title,
        arm_on,
        arm_off,
        on_text,
        off_text,
        setting=setting,
        only_on=only_on,
        claims=claims,
    )
