"""Where two completions of one row part: in a token, in a character, or in how they ended. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shoal.bulk.fields import TOKEN_IDS
from shoal.bulk.flat import FlatRow

CONTEXT_CHARS = 30
COUNTS = ("finish_reason", "completion_tokens", "prompt_tokens")


@dataclass(frozen=True, slots=True)
class Difference:
    """The first difference between a written row and the same row made again.

    Attributes:
        what: `token`, `character`, or the name of a column.
        at: the first differing token's or character's index, from 0; None for a column.
        written, made: what stands there, a text with a little of what follows.
    """

    index: int
    sample: int
    id: str
    what: str
    at: int | None
    written: Any
    made: Any


def first_difference(written: FlatRow, made: FlatRow) -> Difference | None:
    """Where a row made again parts from what is written; None if they are the same.

    Tokens are compared where the written row has them, else characters.
    """
    where = (written["index"], written["sample"], written["id"])
    if written.get(TOKEN_IDS) is not None:
        old, new = written[TOKEN_IDS], made[TOKEN_IDS]
        at = _parting(old, new)
        if at is not None:
            return Difference(*where, "token", at, _token(old, at), _token(new, at))
    text, again = written["text"], made["text"]
    at = _parting(text, again)
    if at is not None:
        end = at + CONTEXT_CHARS
        return Difference(*where, "character", at, text[at:end], again[at:end])
    for name in COUNTS:
        if written[name] != made[name]:
            return Difference(*where, name, None, written[name], made[name])
    return None


def _parting(old: Sequence[Any], new: Sequence[Any]) -> int | None:
    """The first index at which two sequences differ, be it that one of them has ended."""
    for at, (one, other) in enumerate(zip(old, new, strict=False)):
        if one != other:
            return at
    return None if len(old) == len(new) else min(len(old), len(new))


def _token(ids: Sequence[int], at: int) -> int | None:
    return ids[at] if at < len(ids) else None
