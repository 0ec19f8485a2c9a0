"""The figures of a kill run, their bound, and whether they are good enough."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.faults.recoveries import Fault

MAX_SHOWN = 20


@dataclass(slots=True)
class Report:
    """What one run did and found.

    Attributes:
        kills_on_holders: SIGKILLs whose worker held jobs at that moment.
        jobs_hit, requests_hit: jobs held at a fault and their requests, once for each fault.
        unharmed: jobs held at a kill whose commit was already on its way.
        recovery_s: by fault, seconds until each job that was held then ran again.
        violations: all that must not be, in words.
    """

    requests: int
    jobs: int
    kills: dict[str, int]
    kills_on_holders: int
    pauses: int
    jobs_hit: int
    requests_hit: int
    unharmed: int
    lost: int
    duplicates: int
    recovery_s: dict[Fault, list[float]]
    recovery_limit_s: float
    violations: list[str] = field(default_factory=list)
    rq_info_looks: int = 0
    rq_info_errors: int = 0
    duration_s: float = 0.0

    def all_violations(self) -> list[str]:
        """Also those that only the figures as a whole show."""
        found = list(self.violations)
        for fault, waits in self.recovery_s.items():
            worst = max(waits, default=0.0)
            if worst > self.recovery_limit_s:
                limit = f"the limit is {self.recovery_limit_s:g} s"
                found.append(f"a job waited {worst:.1f} s after a fault of its {fault}; {limit}")
        if self.kills_on_holders * 2 < sum(self.kills.values()):
            found.append(f"only {self.kills_on_holders} kills hit a worker that held jobs")
        if self.rq_info_looks == 0:
            found.append("`rq info` never looked")
        return found

    def bounds(self) -> dict[str, float]:
        """The rule of three: at 95%, what a run without a loss allows at the most.

        No failure in n independent trials leaves a probability under 3/n (Hanley and
        Lippman-Hand, 1983). Requests of one job share its fate, so jobs are the cautious count.
        """
        counts = {"request": self.requests, "request hit": self.requests_hit}
        counts |= {"job hit": self.jobs_hit, "kill": sum(self.kills.values())}
        return {what: 3 / count for what, count in counts.items() if count}

    def json(self) -> str:
        """All of it, for programs."""
        values: dict[str, Any] = dataclasses.asdict(self)
        values["recovery_s"] = {
            fault: summary(waits) for fault, waits in self.recovery_s.items() if waits
        }
        values["violations"] = self.all_violations()
        values["loss_bounds_95"] = self.bounds() if not self.lost else {}
        return json.dumps(values, indent=2)

    def table(self) -> str:
        """All of it, for people."""
        kills = ", ".join(f"{count} of the {what}" for what, count in sorted(self.kills.items()))
        rows = [
            ("requests", f"{self.requests} in {self.jobs} jobs"),
            ("SIGKILLs", f"{kills}; {self.kills_on_holders} while jobs were held"),
            ("stops past the lease", str(self.pauses)),
            ("held at a fault", f"{self.jobs_hit} jobs, {self.requests_hit} requests"),
            ("already committing", f"{self.unharmed} jobs"),
            ("lost", f"{self.lost} requests"),
            ("answered twice", f"{self.duplicates} jobs"),
        ]
        for fault, waits in self.recovery_s.items():
            if waits:
                one = summary(waits)
                text = f"p50 {one['p50']:.2f} s, p99 {one['p99']:.2f} s, longest {one['max']:.2f} s"
                rows.append((f"runs again ({fault})", f"{text}, {len(waits)} jobs"))
        rows.append(("limit of that", f"{self.recovery_limit_s:g} s"))
        rows.append(("rq info", f"{self.rq_info_looks} looks, {self.rq_info_errors} failed"))
        if not self.lost:
            each = ", ".join(f"{bound:.2g} a {what}" for what, bound in self.bounds().items())
            rows.append(("chance of loss, 95%", f"under {each}"))
        rows.append(("took", f"{self.duration_s:.0f} s"))
        violations = self.all_violations()
        rows.append(("violations", str(len(violations))))
        lines = [f"{name:<22} {text}" for name, text in rows]
        return "\n".join(lines + [f"  ! {text}" for text in violations[:MAX_SHOWN]])


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, 99th percentile (nearest rank) and greatest of some seconds."""
    ordered = sorted(values)

    def rank(ratio: float) -> float:
        return ordered[max(0, math.ceil(ratio * len(ordered)) - 1)]

    return {"num": len(ordered), "p50": rank(0.5), "p99": rank(0.99), "max": ordered[-1]}
