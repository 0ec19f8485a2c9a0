"""The share of padding while a command watched: from counters, over workers that come and go."""

from __future__ import annotations

from shoal.cli.padding import PaddingCount
from shoal.status import WorkerState


def worker(name: str, tokens: int, padding_tokens: int) -> WorkerState:
    return WorkerState(
        name, "busy", ("q",), padding_ratio=0.9, tokens=tokens, padding_tokens=padding_tokens
    )


def test_what_was_computed_before_does_not_count() -> None:
    padding = PaddingCount()
    padding.look([worker("a", 1_000, 9_000)])
    assert padding.ratio == 0.9

    padding.look([worker("a", 1_030, 9_010), worker("b", 5, 5)])
    padding.look([worker("b", 35, 35)])

    assert padding.num_padding == 10 + 30
    assert padding.ratio == 40 / 100


def test_workers_that_tell_nothing_leave_it_unknown() -> None:
    padding = PaddingCount()
    padding.look([WorkerState("other", "busy", ("q",))])

    assert padding.ratio is None
