"""Flat output rows: one a completion, every column in order, and their canonical bytes.

Owns what a row of the output is, whatever file it goes into; `rows_sha256` is over these bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shoal.bulk.fields import COLUMNS, TOKEN_IDS
from shoal.bulk.rows import InputRow
from shoal.wire import Completion, GenerationResult

FlatRow = dict[str, Any]


def canonical_line(flat: Mapping[str, Any]) -> bytes:
    """A row as one line of compact JSON in UTF-8."""
    text = json.dumps(flat, ensure_ascii=False, separators=(",", ":"))
    return text.encode(errors="replace") + b"\n"


def flat_rows(
    row: InputRow, result: GenerationResult, *, with_token_ids: bool = False
) -> Iterator[FlatRow]:
    """A result as rows, one a completion."""
    for completion in result.completions:
        flat = flat_row(
            row,
            completion,
            prompt_tokens=result.usage.prompt_tokens,
            completion_tokens=len(completion.token_ids),
            model=result.model,
            fingerprint=result.fingerprint,
        )
        if with_token_ids:
            flat[TOKEN_IDS] = completion.token_ids
        yield flat


def flat_row(
    row: InputRow,
    completion: Completion,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    model: str,
    fingerprint: str,
) -> FlatRow:
    """One completion of a row, kept columns last."""
    request = row.request
    values = (
        row.place.index,
        row.place.part * request.sampling.n + completion.index,
        row.id,
        prompt_text(row),
        completion.text,
        completion.finish_reason,
        prompt_tokens,
        completion_tokens,
        request.sampling.seed,
        model,
        fingerprint,
        json.dumps(row.metadata, ensure_ascii=False),
    )
    return {**dict(zip(COLUMNS, values, strict=True)), **row.kept}


def prompt_text(row: InputRow) -> str:
    """A row's prompt as a string column has it: token ids and conversations as JSON."""
    request = row.request
    if request.messages:
        turns = [message.model_dump(exclude_none=True) for message in request.messages]
        return json.dumps(turns, ensure_ascii=False)
    return request.prompt if isinstance(request.prompt, str) else json.dumps(request.prompt)


def canonical_lines(rows: Iterable[FlatRow]) -> list[bytes]:
    """Rows as lines."""
    return [canonical_line(flat) for flat in rows]
