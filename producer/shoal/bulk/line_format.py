"""The lines that a run's output consists of: flat rows, or OpenAI's response lines.

Owns which lines a record is answered with, how they are known again, and the canonical rows that
they stand for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from shoal.bulk.flat import FlatRow, canonical_line, flat_rows
from shoal.bulk.openai_answers import (
    Answered,
    flat_from_response,
    response_id,
    response_line,
)
from shoal.bulk.rows import InputRow

Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Lines:
    """What a record is answered with.

    Attributes:
        stored: the lines as they go into the output.
        canonical: the flat rows as they go into `rows_sha256`.
    """

    stored: list[bytes]
    canonical: list[bytes]
    prompt_tokens: int
    completion_tokens: int
    fingerprint: str | None = None


class LineFormat(Protocol):
    """One of two; see the module."""

    def lines(self, answered: Sequence[Answered]) -> Lines:
        """What a record is answered with, all its prompts together."""
        ...

    def keys(self, rows: Sequence[InputRow]) -> list[Key]:
        """How the lines of this record are known, in order."""
        ...

    def key(self, record: Mapping[str, Any]) -> Key:
        """How this stored line is known."""
        ...

    def found(
        self, rows: Sequence[InputRow], stored: Sequence[tuple[bytes, dict[str, Any]]]
    ) -> Lines | None:
        """The answer that these stored lines are; None if they are none after all."""
        ...


@dataclass(frozen=True, slots=True)
class FlatLines:
    """One flat row a completion."""

    with_token_ids: bool = False

    def lines(self, answered: Sequence[Answered]) -> Lines:
        """What a record is answered with."""
        flats = [
            flat
            for row, result in answered
            for flat in flat_rows(row, result, with_token_ids=self.with_token_ids)
        ]
        stored = [canonical_line(flat) for flat in flats]
        return Lines(
            stored,
            stored,
            sum(result.usage.prompt_tokens for _row, result in answered),
            sum(result.usage.completion_tokens for _row, result in answered),
        )

    def keys(self, rows: Sequence[InputRow]) -> list[Key]:
        """Index, id and sample."""
        num_samples = sum(row.request.sampling.n for row in rows)
        return [(rows[0].place.index, rows[0].id, sample) for sample in range(num_samples)]

    def key(self, record: Mapping[str, Any]) -> Key:
        """Index, id and sample."""
        return (record.get("index"), record.get("id"), record.get("sample"))

    def found(
        self, rows: Sequence[InputRow], stored: Sequence[tuple[bytes, dict[str, Any]]]
    ) -> Lines | None:
        """The answer that these lines are."""
        lines = [line for line, _record in stored]
        return Lines(lines, lines, *_usage(rows, [record for _line, record in stored]))


@dataclass(frozen=True, slots=True)
class ResponseLines:
    """One of OpenAI's response lines a record."""

    with_token_ids: bool = False
    _flat: FlatLines = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_flat", FlatLines(self.with_token_ids))

    def lines(self, answered: Sequence[Answered]) -> Lines:
        """What a record is answered with."""
        flat = self._flat.lines(answered)
        line = response_line(answered, with_token_ids=self.with_token_ids)
        return Lines([line], flat.canonical, flat.prompt_tokens, flat.completion_tokens)

    def keys(self, rows: Sequence[InputRow]) -> list[Key]:
        """The line's id and custom_id."""
        return [(response_id(rows[0]), rows[0].id)]

    def key(self, record: Mapping[str, Any]) -> Key:
        """The line's id and custom_id."""
        return (record.get("id"), record.get("custom_id"))

    def found(
        self, rows: Sequence[InputRow], stored: Sequence[tuple[bytes, dict[str, Any]]]
    ) -> Lines | None:
        """The answer that this line is."""
        ((line, record),) = stored
        try:
            flats = flat_from_response(rows, record)
        except (KeyError, TypeError, ValueError):
            return None
        return Lines([line], [canonical_line(flat) for flat in flats], *_usage(rows, flats))


def _usage(rows: Sequence[InputRow], flats: Sequence[FlatRow]) -> tuple[int, int, str | None]:
    """Prompt tokens, each prompt's once; completion tokens; the fingerprint."""
    firsts, at = [], 0
    for row in rows:
        firsts.append(flats[at])
        at += row.request.sampling.n
    return (
        sum(flat.get("prompt_tokens") or 0 for flat in firsts),
        sum(flat.get("completion_tokens") or 0 for flat in flats),
        flats[0].get("fingerprint"),
    )
