"""What a bulk run is to make, what bounds it, and how far it has come: plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from shoal.bulk.fields import Fields, Kind
from shoal.bulk.rows import RowDefaults
from shoal.bulk.shards import ROWS_PER_SHARD
from shoal.errors import InvalidRequest
from shoal.wire import GenerationResult

OnLongRow = Literal["error", "truncate-left", "skip"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run is to make.

    Attributes:
        sampling: fields of SamplingParams without `seed`, for rows that have none of their own.
        seed: the run's; row i's follows from it and i.
        limit: rows at the most.
        model: as the user named it; a run is bound to it.
        mixed: whether workers of several kinds may make the rows; else they are the first one's.
        fields: which fields of a record are its prompt and id, and which are kept.
        on_long: what becomes of a row whose prompt does not fit: an error, cut at its start, or
            left out.
        ignore_model: whether the models that batch lines name are not asked for.
        return_token_ids: whether each row has the tokens of its completion.
        rows_per_shard: of a Parquet output.
    """

    source: Path
    output: Path
    sampling: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    limit: int | None = None
    model: str | None = None
    overwrite: bool = False
    mixed: bool = False
    fields: Fields = field(default_factory=Fields)
    on_long: OnLongRow = "error"
    ignore_model: bool = False
    return_token_ids: bool = False
    rows_per_shard: int = ROWS_PER_SHARD

    def row_defaults(self, kinds: Mapping[str, Kind]) -> RowDefaults:
        """How the rows of the input are read, with these types of kept columns."""
        return RowDefaults(
            self.sampling,
            self.seed,
            self.fields,
            kinds,
            on_long="truncate-left" if self.on_long == "truncate-left" else "error",
            skip_long=self.on_long == "skip",
            ignore_model=self.ignore_model,
        )


@dataclass(frozen=True, slots=True)
class MaxFailures:
    """How many rows may fail before a run stops: a number, or a share of all rows."""

    number: int | None = None
    ratio: float | None = None

    @classmethod
    def parse(cls, text: str) -> MaxFailures:
        """Read `N` or `P%`.

        Raises:
            InvalidRequest: it is neither.
        """
        digits, percent, rest = text.partition("%")
        try:
            if percent and not rest and 0 <= float(digits) <= 100:
                return cls(ratio=float(digits) / 100)
            if not percent and int(digits) >= 0:
                return cls(number=int(digits))
        except ValueError:
            pass
        raise InvalidRequest(f"--max-failures is {text!r}; give a number of rows, or a share as 5%")

    def allows(self, rows_failed: int, rows_total: int) -> bool:
        """Whether a run of so many rows may go on after so many failures."""
        limit = self.number if self.ratio is None else self.ratio * rows_total
        return limit is None or rows_failed <= limit


@dataclass(frozen=True, slots=True)
class Limits:
    """What bounds a run in time, failures and requests in flight."""

    max_in_flight: int
    max_failures: MaxFailures = field(default_factory=MaxFailures)
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class Workers:
    """Who makes a run's rows, as far as it matters to the run.

    Attributes:
        num_slots: sequences that they decode at once, all together.
        are_own: whether they end with the run, so that nobody finishes what it leaves behind.
    """

    num_slots: int = 0
    are_own: bool = False


@dataclass(slots=True)
class Received:
    """What has come since this start, written or not."""

    tokens: int = 0
    completions: int = 0
    at_limit: int = 0
    jobs_lost: int = 0

    def add(self, result: GenerationResult) -> None:
        """Count one result."""
        self.tokens += result.usage.completion_tokens
        self.completions += len(result.completions)
        self.at_limit += sum(one.finish_reason == "length" for one in result.completions)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come. Tokens and seconds count from this start, rows from the first.

    Attributes:
        prompt_tokens, completion_tokens: of the rows that are written.
        tokens_received: completion tokens, also of rows that wait for an earlier one.
        completions_received, num_at_limit: how many came since this start, and how many of them
            were ended by max_tokens.
        jobs_lost: jobs that were gone from Redis without an answer, and were sent again.
    """

    rows_total: int
    rows_done: int
    rows_failed: int
    rows_before: int
    prompt_tokens: int
    completion_tokens: int
    elapsed_s: float
    tokens_received: int = 0
    completions_received: int = 0
    num_at_limit: int = 0
    jobs_lost: int = 0

    @property
    def limit_ratio(self) -> float | None:
        """The share of completions that max_tokens has ended; None before there are any."""
        received = self.completions_received
        return self.num_at_limit / received if received else None

    @property
    def tokens_per_s(self) -> float:
        """Completion tokens a second since this start."""
        return self.completion_tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds left at the pace since this start; None before there is one."""
        done = self.rows_done - self.rows_before
        return (self.rows_total - self.rows_done) / done * self.elapsed_s if done else None
