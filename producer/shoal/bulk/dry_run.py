"""What a run would be, without generating: rows, tokens, refusals, disk.

Owns the reckoning. Tokens are counted by a worker, which tokenises and checks each request as it
would for a run; without one they are reckoned from characters. It knows no terminal.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice

from shoal.bulk.line_format import LineFormat
from shoal.bulk.outcomes import result_error
from shoal.bulk.rows import FailedRow, InputRow, Row
from shoal.client import Client
from shoal.errors import InvalidRequest, PromptTooLong, ShoalError
from shoal.jobs import BYTES_PER_TOKEN, prompt_bytes
from shoal.wire import Completion, GenerationRequest, GenerationResult, ResultError, Usage

GROUP_ROWS = 512
RESULT_TTL_S = 600
MAX_REASONS = 20
OTHER = "other reasons"

Counter = Callable[[Sequence[GenerationRequest]], list[GenerationResult]]


@dataclass(slots=True)
class Refusal:
    """Why rows would be refused: how many, and the first of them as an example."""

    code: str
    message: str
    line: int
    rows: int = 0


@dataclass(slots=True)
class Forecast:
    """What a run would be.

    Attributes:
        rows: records of the input; prompts: those of them that would be generated from, of which a
            batch line may have several.
        is_counted: whether a worker has counted the tokens; else they are reckoned.
        max_completion_tokens: if no completion ends before its `max_tokens`.
        max_output_bytes: then, before compression.
    """

    is_counted: bool
    rows: int = 0
    prompts: int = 0
    refused: int = 0
    truncated: int = 0
    skipped: int = 0
    prompt_tokens: int = 0
    max_completion_tokens: int = 0
    max_output_bytes: int = 0
    refusals: dict[str, Refusal] = field(default_factory=dict)

    def refuse(self, row: FailedRow) -> None:
        """Count a row that would be an error, under its reason: its message but for the numbers."""
        self.refused += 1
        reason = row.error.code + re.sub(r"'[^']*'|\d+", "", row.error.message)[:80]
        if reason not in self.refusals and len(self.refusals) >= MAX_REASONS:
            reason = OTHER
        first = Refusal(row.error.code, row.error.message, row.place.line)
        self.refusals.setdefault(reason, first).rows += 1


def forecast(
    rows: Iterator[Row],
    line_format: LineFormat,
    count: Counter | None,
    *,
    skips_long: bool,
    on_group: Callable[[Forecast], None],
) -> Forecast:
    """Go through all rows.

    Args:
        count: results with token counts for requests; None: reckon.
        on_group: told how far it is, now and then.
    """
    found = Forecast(is_counted=count is not None)
    while group := list(islice(rows, GROUP_ROWS)):
        good = [row for row in group if isinstance(row, InputRow)]
        results = iter((count or reckon)([row.request for row in good]) if good else [])
        for row in group:
            found.rows += row.place.part == 0
            if isinstance(row, FailedRow):
                _refuse(found, row, skips_long=skips_long)
            else:
                _add(found, row, next(results), line_format, skips_long=skips_long)
        on_group(found)
    return found


def reckon(requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
    """Token counts from the prompts' lengths."""
    return [_counted(request, prompt_bytes(request) // BYTES_PER_TOKEN) for request in requests]


def counter(client: Client, queue: str, model: str | None) -> Counter:
    """Lets the queue's workers count."""

    def count(requests: Sequence[GenerationRequest]) -> list[GenerationResult]:
        asked = [
            request.model_copy(update={"count_only": True, "model": request.model or model})
            for request in requests
        ]
        jobs = client.submit_many(asked, queue=queue, result_ttl=RESULT_TTL_S)
        results = []
        for job in jobs:
            try:
                results.append(job.result())
            except ShoalError as error:
                results.append(GenerationResult(id=job.id, error=_error(error, job.id)))
        client.forget(sorted({job.handle.job_id for job in jobs}), queue)
        return results

    return count


def _error(error: ShoalError, job_id: str) -> ResultError:
    """An exception as the error that the worker answered, without the name of the job."""
    found = result_error(error)
    if isinstance(error, InvalidRequest):
        code = "prompt_too_long" if isinstance(error, PromptTooLong) else "invalid_request"
        found = ResultError(code=code, message=found.message)
    return found.model_copy(update={"message": found.message.removeprefix(f"{job_id}: ")})


def _add(
    found: Forecast,
    row: InputRow,
    result: GenerationResult,
    line_format: LineFormat,
    *,
    skips_long: bool,
) -> None:
    if result.error is not None:
        failed = FailedRow(row.place, row.id, row.source, result.error)
        _refuse(found, failed, skips_long=skips_long)
        return
    sampling = row.request.sampling
    new_tokens = sampling.max_tokens * sampling.n
    found.prompts += 1
    found.truncated += result.truncated_tokens > 0
    found.prompt_tokens += result.usage.prompt_tokens
    found.max_completion_tokens += new_tokens
    empty = line_format.lines([(row, result)])
    found.max_output_bytes += sum(map(len, empty.stored)) + new_tokens * BYTES_PER_TOKEN


def _refuse(found: Forecast, row: FailedRow, *, skips_long: bool) -> None:
    if row.is_skipped or (skips_long and row.error.code == "prompt_too_long"):
        found.skipped += 1
    else:
        found.refuse(row)


def _counted(request: GenerationRequest, num_tokens: int) -> GenerationResult:
    """As a worker answers that only counts."""
    samples = range(request.sampling.n)
    return GenerationResult(
        id=request.id or "",
        completions=[
            Completion(index=sample, text="", token_ids=[], finish_reason="length")
            for sample in samples
        ],
        usage=Usage(prompt_tokens=num_tokens, completion_tokens=0),
    )
