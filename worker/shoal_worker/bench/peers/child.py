"""One engine in a process of its own: `python -m shoal_worker.bench.peers.child`.

Without arguments it prints which engines this interpreter has. With a name and a setup as JSON it
loads that engine and answers lines of JSON: prompts and lengths in; seconds and lengths out. It
imports the standard library alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any, TextIO

from shoal_worker.bench.peers.engines import ENGINES
from shoal_worker.bench.peers.protocol import Peer, Setup


def main(arguments: list[str]) -> None:
    """Answer on what was standard output; whatever an engine prints goes to standard error."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        if arguments:
            name, setup = arguments
            _serve(name, Setup(**json.loads(setup)), answers)
        else:
            installed = [name for name, engine in ENGINES.items() if engine.is_installed]
            _answer(answers, {name: _version(name) for name in installed})


def _serve(name: str, setup: Setup, answers: TextIO) -> None:
    started_s = time.perf_counter()
    peer = ENGINES[name].load(setup)
    _answer(answers, {"load_s": time.perf_counter() - started_s, "differs": peer.differs})
    for line in sys.stdin:
        _answer(answers, _timed(peer, **json.loads(line)))


def _timed(peer: Peer, prompts: list[list[int]], new_tokens: list[int]) -> dict[str, Any]:
    started_s = time.perf_counter()
    made = peer.generate(prompts, new_tokens)
    return {"duration_s": time.perf_counter() - started_s, "made": made}


def _answer(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def _version(name: str) -> str:
    try:
        return version(ENGINES[name].distribution)
    except PackageNotFoundError:
        return "of unknown version"


if __name__ == "__main__":
    main(sys.argv[1:])
