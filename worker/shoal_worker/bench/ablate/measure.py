"""Interleaved pairs: two processes asked in turn, and what came of it as a row."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from statistics import median
from typing import Any, Self

from shoal_worker.bench.ablate.answers import difference
from shoal_worker.bench.ablate.arms import DEFAULT, Arm
from shoal_worker.bench.ablate.claims import claim_rows
from shoal_worker.bench.ablate.ledger import MAIN_METRIC, Output, Reading, Row, RungRow
from shoal_worker.bench.ablate.processes import Spec, TrialProcess, trial_process
from shoal_worker.bench.ablate.ratios import paired_ratio
from shoal_worker.bench.ablate.rungs import Rung
from shoal_worker.bench.ablate.switches import Switch

Say = Callable[[str], None]
Values = dict[str, list[tuple[float, float]]]
_LITTLE_S = 4.0


class Measurements:
    """Measures rows; keeps the default's process for as long as it is open.

    Args:
        spec: model, device and load; its arm and kind are each row's own.
        say: is told what goes on.
    """

    def __init__(self, spec: Spec, say: Say) -> None:
        self._spec = spec
        self._say = say
        self._kept = ExitStack()
        self._default: TrialProcess | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def default_facts(self) -> dict[str, str]:
        """What the default arm is on this device."""
        facts: dict[str, str] = self._default_process().ask("facts")
        return facts

    def row(self, switch: Switch) -> Row:
        """Measure one switch."""
        self._say(switch.title)
        if switch.kind == "loading":
            return self._loading_row(switch)
        with ExitStack() as stack:
            on = stack.enter_context(self._process(switch, switch.on, may_be_kept=True))
            is_control = switch.on == switch.off
            off = stack.enter_context(self._process(switch, switch.off, may_be_kept=not is_control))
            values, last = self._pairs(switch.title, on, off)
            if switch.kind == "serving":
                values["load_s"] = [(on.load_s, off.load_s)]
            _add(values, on.ask("peaks"), off.ask("peaks"))
            facts = on.ask("facts") if switch.kind == "serving" else {}
            output = _output(switch, on, off, last)
            evidence = _evidence(on, off)
        return _row(switch, values, output, evidence, facts)

    def rung(self, rung: Rung) -> RungRow:
        """Measure one rung next to the default."""
        self._say(rung.title)
        default = self._default_process()
        if rung.arm == DEFAULT:
            speeds = [default.ask("run").metrics["tokens_per_s"] for _ in range(3)]
            return _rung_row(rung, [(speed, speed) for speed in speeds])
        spec = replace(self._spec, arm=rung.arm, kind="serving")
        with trial_process(spec) as process:
            values, _ = self._pairs(rung.title, process, default)
        return _rung_row(rung, values["tokens_per_s"])

    def _pairs(
        self, title: str, on: TrialProcess, off: TrialProcess
    ) -> tuple[Values, tuple[Any, Any]]:
        """Runs of both in turn, until there are enough or the time is up, and the last pair."""
        load = self._spec.load
        values: Values = {}
        started_s = time.monotonic()
        last = on.ask("run"), off.ask("run")
        # The first pair warms up, unless it takes long enough for that not to matter.
        if time.monotonic() - started_s > _LITTLE_S * 2:
            _add(values, last[0].metrics, last[1].metrics)
        while (num_pairs := len(next(iter(values.values()), ()))) < load.max_pairs:
            is_late = time.monotonic() - started_s > load.budget_s
            if is_late and num_pairs >= load.min_pairs:
                break
            self._say(f"{title}: pair {num_pairs + 1} of at most {load.max_pairs}")
            # Whichever runs first in a pair is the second in the next.
            if num_pairs % 2:
                second = off.ask("run")
                last = on.ask("run"), second
            else:
                last = on.ask("run"), off.ask("run")
            _add(values, last[0].metrics, last[1].metrics)
        return values, last

    def _loading_row(self, switch: Switch) -> Row:
        values: Values = {}
        for number in range(self._spec.load.fresh_pairs):
            self._say(f"{switch.title}: pair {number + 1} of {self._spec.load.fresh_pairs}")
            with self._process(switch, switch.on) as on:
                made_on = {"load_s": on.load_s} | on.ask("peaks")
                logits_on, counts_on = on.ask("logits"), on.ask("load_counts")
                facts = on.ask("facts")
            with self._process(switch, switch.off) as off:
                _add(values, made_on, {"load_s": off.load_s} | off.ask("peaks"))
                logits_off, counts_off = off.ask("logits"), off.ask("load_counts")
        output = Output(
            equal=None, compared=0, max_logit_difference=_largest_difference(logits_on, logits_off)
        )
        return _row(switch, values, output, difference(counts_on, counts_off) or "", facts)

    @contextmanager
    def _process(
        self, switch: Switch, arm: Arm, *, may_be_kept: bool = False
    ) -> Iterator[TrialProcess]:
        if may_be_kept and arm == DEFAULT and switch.kind == "serving":
            yield self._default_process()
            return
        with trial_process(replace(self._spec, arm=arm, kind=switch.kind)) as process:
            yield process

    def _default_process(self) -> TrialProcess:
        if self._default is None:
            spec = replace(self._spec, arm=DEFAULT, kind="serving")
            self._default = self._kept.enter_context(trial_process(spec))
        return self._default


def _add(values: Values, on: dict[str, float], off: dict[str, float]) -> None:
    for metric, number in on.items():
        values.setdefault(metric, []).append((number, off[metric]))


def _reading(pairs: list[tuple[float, float]]) -> Reading:
    ons, offs = [on for on, _ in pairs], [off for _, off in pairs]
    ratio = paired_ratio(ons, offs)
    return Reading(
        on=median(ons),
        off=median(offs),
        ratio=ratio.ratio,
        low=ratio.low,
        high=ratio.high,
        values=pairs,
    )


def _row(
    switch: Switch, values: Values, output: Output | None, evidence: str, facts: dict[str, str]
) -> Row:
    main = MAIN_METRIC[switch.kind]
    readings = {metric: _reading(pairs) for metric, pairs in values.items()}
    return Row(
        name=switch.name,
        title=switch.title,
        kind=switch.kind,
        on_text=switch.on_text,
        off_text=switch.off_text,
        setting=switch.setting,
        default=switch.default,
        readings={main: readings.pop(main), **readings},
        output=output,
        evidence=evidence,
        claims=claim_rows(switch.claims, {**readings, main: _reading(values[main])}, facts),
    )


def _rung_row(rung: Rung, pairs: list[tuple[float, float]]) -> RungRow:
    reading = _reading(pairs)
    return RungRow(
        title=rung.title,
        tokens_per_s=reading.on,
        of_default=reading.ratio,
        low=reading.low,
        high=reading.high,
        pairs=len(pairs),
    )


def _evidence(on: TrialProcess, off: TrialProcess) -> str:
    return difference(on.ask("counts"), off.ask("counts")) or ""


def _output(switch: Switch, on: TrialProcess, off: TrialProcess, last: tuple[Any, Any]) -> Output:
    pairs = list(zip(last[0].completions, last[1].completions, strict=True))
    draws_alike = {switch.on.top_k, switch.off.top_k}.isdisjoint({"scatter", "mask"})
    return Output(
        equal=sum(a == b for a, b in pairs) if draws_alike else None,
        compared=len(pairs),
        max_logit_difference=(
            _largest_difference(on.ask("logits"), off.ask("logits"))
            if switch.kind == "serving"
            else None
        ),
    )


def _largest_difference(on: tuple[list[int], Any], off: tuple[list[int], Any]) -> float | None:
    """Between logits after equal first tokens; None where no row has them."""
    firsts = zip(on[0], off[0], strict=False)
    differences = [
        float(abs(on[1][row] - off[1][row]).max())
        for row, (first, other) in enumerate(firsts)
        if first == other
    ]
    return max(differences, default=None)
