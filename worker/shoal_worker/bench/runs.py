"""One run of a workload as figures, and what its steps did, added up. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field

from shoal_worker.events import Event, Phase, StepRun


@dataclass(frozen=True, slots=True)
class Run:
    """A workload, from its first step or submission to its last result."""

    new_tokens: int
    duration_s: float

    @property
    def tokens_per_s(self) -> float:
        """New tokens of all sequences."""
        return self.new_tokens / self.duration_s


@dataclass(slots=True)
class PhaseTotal:
    """All steps of one phase.

    Attributes:
        rows, slots: that did work, and that were computed.
        tokens, padding_tokens: positions that did work, and those computed for nothing.
        seconds: in the engine's calls.
    """

    steps: int = 0
    rows: int = 0
    slots: int = 0
    tokens: int = 0
    padding_tokens: int = 0
    seconds: float = 0.0

    @property
    def padding_ratio(self) -> float:
        """Share of the computed positions that did nothing."""
        computed = self.tokens + self.padding_tokens
        return self.padding_tokens / computed if computed else 0.0

    @property
    def rows_ratio(self) -> float:
        """Share of the computed rows that did something."""
        return self.rows / self.slots if self.slots else 0.0

    @property
    def step_ms(self) -> float:
        """Of a step, on average."""
        return 1000 * self.seconds / self.steps if self.steps else 0.0


@dataclass(slots=True)
class StepTotals:
    """A subscriber that adds up steps, by phase, and tokens by the lane that made them."""

    phases: dict[Phase, PhaseTotal] = field(default_factory=dict)
    tokens_by_lane: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Begin anew."""
        self.phases = {"prefill": PhaseTotal(), "decode": PhaseTotal()}
        self.tokens_by_lane = {}

    def __call__(self, event: Event) -> None:
        """Count a step; other events are none of its business."""
        if not isinstance(event, StepRun):
            return
        total = self.phases[event.phase]
        total.steps += 1
        total.rows += event.rows
        total.slots += event.slots
        total.tokens += event.tokens
        total.padding_tokens += event.padding_tokens
        if event.phase == "decode":
            before = self.tokens_by_lane.get(event.lane, 0)
            self.tokens_by_lane[event.lane] = before + event.tokens

    def busiest_lane(self) -> str:
        """The lane that made most tokens."""
        assert self.tokens_by_lane, "a workload was run"
        return max(self.tokens_by_lane, key=self.tokens_by_lane.__getitem__)
