"""Where a written row and the same row made again part."""

from __future__ import annotations

from typing import Any

import pytest

from shoal.bulk.comparison import Difference, first_difference

ROW: dict[str, Any] = {
    "index": 3,
    "sample": 1,
    "id": "x",
    "text": "one two three",
    "finish_reason": "length",
    "prompt_tokens": 4,
    "completion_tokens": 3,
}
TOKENS = {"token_ids": [10, 20, 30]}


def test_the_same_is_no_difference() -> None:
    assert first_difference(ROW, ROW | TOKENS) is None
    assert first_difference(ROW | TOKENS, ROW | TOKENS) is None


@pytest.mark.parametrize(
    ("written", "made", "what", "at", "old", "new"),
    [
        (TOKENS, {"token_ids": [10, 21, 30]}, "token", 1, 20, 21),
        (TOKENS, {"token_ids": [10, 20]}, "token", 2, 30, None),
        ({}, {"text": "one twelve"}, "character", 6, "o three", "elve"),
        ({}, {"text": "one two three."}, "character", 13, "", "."),
        ({}, {"finish_reason": "stop"}, "finish_reason", None, "length", "stop"),
        ({}, {"prompt_tokens": 5}, "prompt_tokens", None, 4, 5),
    ],
)
def test_the_first_difference_is_told(
    written: dict[str, Any], made: dict[str, Any], what: str, at: int | None, old: Any, new: Any
) -> None:
    found = first_difference(ROW | written, ROW | TOKENS | made)

    assert found == Difference(3, 1, "x", what, at, old, new)
