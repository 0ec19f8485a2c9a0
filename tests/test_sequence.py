"""A sequence takes tokens until one of them ends it."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.wire import SamplingParams
from shoal_worker.sequence import SampledToken, Sequence, SequenceKey, TokenLogprobs

STOP = 9


def sequence(**sampling: Any) -> Sequence:
    return Sequence(
        SequenceKey("job", 0, 0),
        prompt_token_ids=(1, 2, 3),
        sampling=SamplingParams(**sampling),
        seed=0,
        stop_token_ids=frozenset({STOP}),
    )


def feed(one: Sequence, *tokens: int) -> None:
    for token in tokens:
        one.append(SampledToken(token))


def test_a_sequence_ends_with_the_last_token_it_may_have() -> None:
    one = sequence(max_tokens=3)

    feed(one, 1, 2)
    assert not one.is_finished
    feed(one, 3)

    assert one.finish_reason == "length"
    assert one.output_token_ids == [1, 2, 3]
    assert not one.ended_by_token


def test_a_stop_token_ends_it_and_is_kept() -> None:
    one = sequence()

    feed(one, 1, STOP)

    assert one.finish_reason == "stop"
    assert one.output_token_ids == [1, STOP]
    assert one.ended_by_token


def test_a_stop_token_in_the_last_place_is_a_stop() -> None:
    one = sequence(max_tokens=2)

    feed(one, 1, STOP)

    assert one.finish_reason == "stop"


@pytest.mark.parametrize("min_tokens", [0, 1, 2])
def test_a_stop_token_counts_only_behind_the_least_number_of_tokens(min_tokens: int) -> None:
    one = sequence(min_tokens=min_tokens)

    feed(one, *[STOP] * min_tokens)
    assert not one.is_finished
    feed(one, STOP)

    assert one.finish_reason == "stop"


def test_a_stop_token_in_the_last_place_that_came_too_early_is_the_length() -> None:
    one = sequence(max_tokens=2, min_tokens=2)

    feed(one, 1, STOP)

    assert one.finish_reason == "length"
    assert not one.ended_by_token


def test_a_finished_sequence_takes_no_more_tokens() -> None:
    one = sequence(max_tokens=1)
    feed(one, 1)

    with pytest.raises(AssertionError, match="no more tokens"):
        feed(one, 2)


def test_positions_are_those_of_prompt_and_all_new_tokens() -> None:
    assert sequence(max_tokens=5).num_positions == 8


def test_truncating_drops_tokens_and_their_log_probabilities_alike() -> None:
    one = sequence(logprobs=0)
    for token in (5, 6, 7):
        one.append(SampledToken(token, TokenLogprobs(-float(token), ())))

    one.truncate(1)

    assert one.output_token_ids == [5]
    assert [entry.chosen for entry in one.output_logprobs] == [-5.0]


def test_two_sequences_are_told_apart_even_when_alike() -> None:
    one, other = sequence(), sequence()

    assert one != other
    assert len({one, other}) == 2
