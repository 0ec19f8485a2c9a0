"""Switches and rungs measured: which processes run in which rounds, and what came of it as rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, NamedTuple, Self

from shoal_worker.bench.ablate.answers import Run, difference
from shoal_worker.bench.ablate.arms import DEFAULT, Arm
from shoal_worker.bench.ablate.claims import claim_rows
from shoal_worker.bench.ablate.ledger import MAIN_METRIC, Output, Reading, Row, RungRow
from shoal_worker.bench.ablate.processes import Question, Spec, TrialProcess, trial_process
from shoal_worker.bench.ablate.ratios import paired_ratio
from shoal_worker.bench.ablate.rounds import Say, for_each, in_rounds
from shoal_worker.bench.ablate.rungs import Rung
from shoal_worker.bench.ablate.switch import Kind, Switch

Pairs = list[tuple[float, float]]
_OTHER_DRAWS = frozenset({"scatter", "mask"})


class _Side(NamedTuple):
    """One arm of a switch; the control's second is the same arm in a process of its own."""

    arm: Arm
    kind: Kind
    number: int = 0


_DEFAULT_SIDE = _Side(DEFAULT, "serving")


class Measurements:
    """Measures rows; keeps the default's process, and what it has said, for as long as it is open.

    Args:
        spec: model, device and load; its arm and kind are each row's own.
        say: is told what goes on.
    """

    def __init__(self, spec: Spec, say: Say) -> None:
        self._spec = spec
        self._say = say
        self._kept = ExitStack()
        self._default: _Asked | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._kept.close()

    def default_facts(self) -> dict[str, str]:
        """What the default arm is on this device."""
        facts: dict[str, str] = self._default_process().ask("facts")
        return facts

    def rows(self, switches: Sequence[Switch]) -> Iterator[Row]:
        """Measure them, several in the same rounds."""
        yield from (self._loading_row(s) for s in switches if s.kind == "loading")
        for kind in ("tokenising", "serving"):
            rest = iter([switch for switch in switches if switch.kind == kind])
            while group := list(islice(rest, self._spec.load.together)):
                yield from self._group(group)

    def rungs(self, rungs: Sequence[Rung]) -> Iterator[RungRow]:
        """Measure rungs next to the default, which is the last of them."""
        rest = iter(rungs)
        while group := list(islice(rest, self._spec.load.together)):
            sides = [_Side(rung.arm, "serving") for rung in group]
            with ExitStack() as stack:
                asked = self._all_asked([*sides, _DEFAULT_SIDE], stack)
                runs = in_rounds(asked, self._spec.load, self._saying(rung.title for rung in group))
            for rung, side in zip(group, sides, strict=True):
                reading = _reading(_pairs(runs[side], runs[_DEFAULT_SIDE], "tokens_per_s"))
                yield _rung_row(rung, reading)

    def _group(self, group: list[Switch]) -> Iterator[Row]:
        sides = [side for switch in group for side in _sides(switch)]
        with ExitStack() as stack:
            asked = self._all_asked(sides, stack)
            say = self._saying(s.title for s in group)
            runs = in_rounds(asked, self._spec.load, say)
            say("counting what each does")
            for_each(asked.values(), lambda one: one.ask("counts"), self._spec.load)
            for switch in group:
                on, off = _sides(switch)
                yield _row_of_runs(switch, asked[on], asked[off], runs[on], runs[off])

    def _loading_row(self, switch: Switch) -> Row:
        pairs: list[tuple[dict[str, float], dict[str, float]]] = []
        for number in range(self._spec.load.fresh_pairs):
            self._say(f"{switch.title}: pair {number + 1} of {self._spec.load.fresh_pairs}")
            on, off = (self._loaded_afresh(side) for side in _sides(switch))
            pairs.append((on.metrics, off.metrics))
        output = Output(
            equal=None,
            compared=0,
            max_logit_difference=_largest_difference(on.ask("logits"), off.ask("logits")),
        )
        values = {m: [(a[m], b[m]) for a, b in pairs] for m in pairs[0][0]}
        evidence = difference(on.ask("load_counts"), off.ask("load_counts")) or ""
        return _row(switch, values, output, evidence, on.ask("facts"))

    def _loaded_afresh(self, side: _Side) -> _Asked:
        """A process that has done nothing but load, asked everything before it ends."""
        with trial_process(replace(self._spec, arm=side.arm, kind=side.kind)) as process:
            asked = _Asked(process)
            asked.metrics = {"load_s": process.loaded()} | asked.ask("peaks")
            questions: tuple[Question, ...] = ("logits", "facts", "load_counts")
            for question in questions:
                asked.ask(question)
        return asked

    def _all_asked(self, sides: list[_Side], stack: ExitStack) -> dict[_Side, _Asked]:
        asked: dict[_Side, _Asked] = {}
        for side in sides:
            if side == _DEFAULT_SIDE:
                asked[side] = self._default_process()
            elif side not in asked:
                spec = replace(self._spec, arm=side.arm, kind=side.kind)
                asked[side] = _Asked(stack.enter_context(trial_process(spec)))
                if not self._spec.load.side_by_side:
                    asked[side].process.loaded()
        for one in asked.values():
            one.process.loaded()
        return asked

    def _default_process(self) -> _Asked:
        if self._default is None:
            spec = replace(self._spec, arm=DEFAULT, kind="serving")
            self._default = _Asked(self._kept.enter_context(trial_process(spec)))
        return self._default

    def _saying(self, titles: Iterator[str]) -> Say:
        named = ", ".join(titles)
        return lambda text: self._say(f"{named}: {text}")


class _Asked:
    """A process, and what it has answered so far; runs are always new."""

    def __init__(self, process: TrialProcess) -> None:
        self.process = process
        self._answers: dict[Question, Any] = {}
        self.metrics: dict[str, float] = {}

    def run(self) -> Run:
        made: Run = self.process.ask("run")
        return made

    def ask(self, question: Question) -> Any:
        if question not in self._answers:
            self._answers[question] = self.process.ask(question)
        return self._answers[question]


def _sides(switch: Switch) -> tuple[_Side, _Side]:
    is_control = switch.on == switch.off
    return _Side(switch.on, switch.kind), _Side(switch.off, switch.kind, int(is_control))


def _row_of_runs(
    switch: Switch, on: _Asked, off: _Asked, on_runs: list[Run], off_runs: list[Run]
) -> Row:
    values = {metric: _pairs(on_runs, off_runs, metric) for metric in on_runs[0].metrics}
    peaks = on.ask("peaks"), off.ask("peaks")
    values |= {metric: [(peaks[0][metric], peaks[1][metric])] for metric in peaks[0]}
    is_serving = switch.kind == "serving"
    draws_alike = {switch.on.top_k, switch.off.top_k}.isdisjoint(_OTHER_DRAWS)
    completions = list(zip(on_runs[0].completions, off_runs[0].completions, strict=True))
    output = Output(
        equal=sum(a == b for a, b in completions) if draws_alike else None,
        compared=len(completions),
        max_logit_difference=(
            _largest_difference(on.ask("logits"), off.ask("logits")) if is_serving else None
        ),
    )
    evidence = difference(on.ask("counts"), off.ask("counts")) or ""
    return _row(switch, values, output, evidence, on.ask("facts") if is_serving else {})


def _pairs(ons: list[Run], offs: list[Run], metric: str) -> Pairs:
    """Of the rounds that both ran in."""
    return [(a.metrics[metric], b.metrics[metric]) for a, b in zip(ons, offs, strict=False)]


def _reading(pairs: Pairs) -> Reading:
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
    switch: Switch,
    values: dict[str, Pairs],
    output: Output | None,
    evidence: str,
    facts: dict[str, str],
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
        readings={main: readings[main], **readings},
        output=output,
        evidence=evidence,
        claims=claim_rows(switch.claims, readings, facts),
    )


def _rung_row(rung: Rung, reading: Reading) -> RungRow:
    return RungRow(
        title=rung.title,
        tokens_per_s=reading.on,
        of_default=reading.ratio,
        low=reading.low,
        high=reading.high,
        pairs=len(reading.values),
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
