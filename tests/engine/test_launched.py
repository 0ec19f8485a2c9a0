"""Tokens come out in the order of their launch, each to its own sequence, none twice or never."""

from __future__ import annotations

import torch
from tests.engine.serving import sequence

from shoal_worker.engine.launched import Launched, LaunchQueue
from shoal_worker.engine.transfer import ToHost
from shoal_worker.sequence import Sequence


def launch(queue: LaunchQueue, rows: dict[int, Sequence], *steps: list[int]) -> None:
    """Steps of a lane of three slots: the token of every slot."""
    tokens = ToHost(torch.tensor(steps))
    queue.add(Launched(list(rows), list(rows.values()), tokens, (), []))


def read(queue: LaunchQueue, *sequences: Sequence, num_left: int = 0) -> list[list[int]]:
    rows = queue.read(list(sequences), num_left)
    return [[token.token_id for token in row] for row in rows]


def test_each_sequence_gets_the_tokens_of_its_slot() -> None:
    queue = LaunchQueue()
    first, second = sequence([1]), sequence([1])

    launch(queue, {2: first, 0: second}, [10, 11, 12], [20, 21, 22])

    assert read(queue, first, second) == [[12, 22], [10, 20]]
    assert read(queue, first, second) == [[], []]


def test_the_last_launches_can_be_left_for_later() -> None:
    queue = LaunchQueue()
    one = sequence([1])
    launch(queue, {0: one}, [1, 0, 0])
    launch(queue, {0: one}, [2, 0, 0])

    assert read(queue, one, num_left=1) == [[1]]
    assert read(queue, one, num_left=0) == [[2]]


def test_a_sequence_that_was_not_asked_for_keeps_its_tokens() -> None:
    queue = LaunchQueue()
    asked, other = sequence([1]), sequence([1])
    launch(queue, {0: asked, 1: other}, [1, 2, 0])

    assert read(queue, asked) == [[1]]
    assert read(queue, other) == [[2]]


def test_a_slot_s_next_sequence_gets_nothing_of_the_last_one() -> None:
    queue = LaunchQueue()
    ended, following = sequence([1]), sequence([1])
    launch(queue, {0: ended}, [1, 0, 0])
    queue.forget(ended)
    launch(queue, {0: following}, [2, 0, 0])

    assert read(queue, following, ended) == [[2], []]
