"""Shoal and its peers on one workload, in turns.

Owns the order, who is left out and why, and the report. How it is shown is `table`'s.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer

from shoal.errors import ShoalError
from shoal_worker.bench.host import command_line, host
from shoal_worker.bench.peers.engines import ENGINES
from shoal_worker.bench.peers.processes import (
    PeerFailed,
    PeerProcess,
    Place,
    bare_package,
    places,
)
from shoal_worker.bench.peers.protocol import Setup
from shoal_worker.bench.repeats import Repeats, in_turns, ratio
from shoal_worker.bench.workloads import WARM_UP_PART, Choice, Workload, chosen_workload
from shoal_worker.engine.model import device_of, dtype_on
from shoal_worker.engine.source import located
from shoal_worker.settings import EngineSettings

SHOAL = "shoal"


@dataclass(frozen=True, slots=True)
class Wanted:
    """What to measure.

    Attributes:
        peers: names of engines; all where None.
        pythons: interpreters to look in, after our own.
        converted: models in an engine's own format, by its name.
        variants: Shoal once more, with these settings too, by their title.
    """

    workload: Choice
    rounds: int
    peers: tuple[str, ...] | None = None
    pythons: tuple[str, ...] = ()
    converted: Mapping[str, str] = field(default_factory=dict)
    variants: Mapping[str, EngineSettings] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine's figures.

    Attributes:
        shoal_ratio: how many times as fast Shoal was, round by round.
    """

    title: str
    version: str
    differs: str
    load_s: float
    tokens_per_s: Repeats
    shoal_ratio: Repeats


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that was measured, and who was not and why."""

    command: str
    host: dict[str, str]
    model: str
    dtype: str
    threads: int
    workload: str
    prompts: int
    prompt_tokens: int
    new_tokens: int
    measured: list[Measured]
    failed: dict[str, str]
    missing: dict[str, str]

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


@dataclass(slots=True)
class _Entrant:
    """One that runs: its engine, title, interpreter and setup; and what came of it.

    Attributes:
        process: while it is kept loaded.
    """

    engine: str
    title: str
    place: Place
    setup: Setup
    process: PeerProcess | None = None
    differs: str = ""
    load_s: float = 0.0
    tokens_per_s: list[float] = field(default_factory=list)
    failure: str | None = None


def measure(settings: EngineSettings, wanted: Wanted, tell: Callable[[str], None]) -> Report:
    """Load each, warm it up, run all in turns.

    Args:
        tell: is told what happens next.

    Raises:
        ShoalError: Shoal itself failed; a peer that does is told of in the report.
    """
    name, folder = located(settings.model)
    device = device_of(settings.device)
    dtype = str(dtype_on(device, settings.dtype)).removeprefix("torch.")
    threads = settings.threads or os.cpu_count() or 1
    workload = _workload(wanted.workload, folder, device.type)
    with ExitStack() as stack:
        package = stack.enter_context(bare_package())
        tell("looking for peers")
        found = places((sys.executable, *wanted.pythons), package)
        base = Setup(str(folder), str(device), dtype, threads)
        entrants = _entrants(settings, wanted, found, base)
        runner = _Runner(package, workload, tell, keeps=device.type == "cpu")
        stack.callback(runner.close, entrants)
        runner.load_all(entrants)
        for number, title in in_turns([one.title for one in entrants], wanted.rounds):
            entrant = next(one for one in entrants if one.title == title)
            tell(f"round {number + 1} of {wanted.rounds}: {title}")
            runner.run(entrant)
    torch.set_num_threads(threads)
    return Report(
        command=command_line(),
        host=host(device),
        model=name,
        dtype=dtype,
        threads=threads,
        workload=workload.name,
        prompts=len(workload.requests),
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        measured=_measured(entrants),
        failed={one.title: one.failure for one in entrants if one.failure is not None},
        missing={
            engine.title: engine.install
            for key, engine in ENGINES.items()
            if key not in found and _is_wanted(key, wanted, device.type)
        },
    )


class _Runner:
    """Runs entrants; keeps them loaded, or loads each anew where two do not fit the device."""

    def __init__(
        self, package: Path, workload: Workload, tell: Callable[[str], None], *, keeps: bool
    ) -> None:
        self._package = package
        self._workload = workload
        self._tell = tell
        self._keeps = keeps

    def load_all(self, entrants: list[_Entrant]) -> None:
        """Load those that are kept."""
        if self._keeps:
            for entrant in entrants:
                self._tried(entrant, self._load)

    def run(self, entrant: _Entrant) -> None:
        """Once; one that has failed is asked no more."""
        if not self._keeps:
            self._tried(entrant, self._load)
        self._tried(entrant, self._run)
        if not self._keeps:
            self.close([entrant])

    def _tried(self, entrant: _Entrant, part: Callable[[_Entrant], None]) -> None:
        if entrant.failure is not None:
            return
        try:
            part(entrant)
        except PeerFailed as error:
            if entrant.engine == SHOAL:
                raise ShoalError(f"{entrant.title} {error}") from None
            entrant.failure = str(error)
            self.close([entrant])

    def _run(self, entrant: _Entrant) -> None:
        assert entrant.process is not None, "it was loaded before"
        entrant.tokens_per_s.append(entrant.process.run(self._workload).tokens_per_s)

    def close(self, entrants: list[_Entrant]) -> None:
        """End those that run."""
        for entrant in entrants:
            process, entrant.process = entrant.process, None
            if process is not None:
                process.close()

    def _load(self, entrant: _Entrant) -> None:
        self._tell(f"loading {entrant.title}")
        process = PeerProcess(entrant.engine, entrant.place, entrant.setup, self._package)
        entrant.process = process
        entrant.differs, entrant.load_s = process.differs, process.load_s
        self._tell(f"warming up {entrant.title}")
        process.run(self._workload.first(WARM_UP_PART))


def _entrants(
    settings: EngineSettings, wanted: Wanted, found: Mapping[str, Place], base: Setup
) -> list[_Entrant]:
    """Shoal, its variants, and the peers that there are."""
    shoal = found[SHOAL]
    entrants = []
    for title, own in {"Shoal": settings, **wanted.variants}.items():
        given = own.model_dump(exclude={"model"}, exclude_none=True)
        entrants.append(_Entrant(SHOAL, title, shoal, replace(base, settings=given)))
    for key, engine in ENGINES.items():
        if key in found and _is_wanted(key, wanted, base.kind):
            setup = replace(base, converted=wanted.converted.get(key))
            entrants.append(_Entrant(key, engine.title, found[key], setup))
    return entrants


def _is_wanted(key: str, wanted: Wanted, kind: str) -> bool:
    if key == SHOAL or kind not in ENGINES[key].devices:
        return False
    return wanted.peers is None or key in wanted.peers


def _measured(entrants: list[_Entrant]) -> list[Measured]:
    """Those that ran every time; Shoal is the first."""
    ours = Repeats.of(entrants[0].tokens_per_s)
    rows = []
    for one in entrants:
        if one.failure is None:
            theirs = Repeats.of(one.tokens_per_s)
            rows.append(
                Measured(
                    title=one.title,
                    version=one.place.version,
                    differs=one.differs,
                    load_s=one.load_s,
                    tokens_per_s=theirs,
                    shoal_ratio=ratio(ours, theirs),
                )
            )
    return rows


def _workload(choice: Choice, folder: Path, kind: str) -> Workload:
    config = AutoConfig.from_pretrained(folder)
    text_config = config.get_text_config(decoder=True)

    def encode(text: str) -> list[int]:
        token_ids: list[int] = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
        return token_ids

    return chosen_workload(choice, kind, text_config.vocab_size, encode)
