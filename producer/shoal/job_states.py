"""What RQ's status and result stream say of a job, and of each request in it.

Owns the commands that ask and the reading of the replies, up to the exception that stands for an
error. It sends nothing, so the blocking and the asyncio client share all of it.
"""

from __future__ import annotations

import base64
import binascii
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rq.job import Job as RQJob

from shoal.errors import (
    Cancelled,
    Expired,
    GenerationFailed,
    InvalidRequest,
    ModelMismatch,
    PromptTooLong,
    ShoalError,
)
from shoal.jobs import EXPIRIES_KEY, Command, Handle, results_key
from shoal.validation import parse
from shoal.wire import GenerationResult, JobResult, ResultError

log = logging.getLogger("shoal.client")

MAX_STATES_PER_READ = 1_000
FINAL_STATUSES = frozenset({"finished", "failed", "canceled", "stopped"})


class StreamedText:
    """A streaming job's text, put together from pieces that say where they belong.

    A job that lost its worker runs again and, having the same seed, says the same from its start:
    what was there before is left out. A worker of another kind may say something else.

    Args:
        job_id: names the job in a warning.
    """

    def __init__(self, job_id: str = "") -> None:
        self._job_id = job_id
        self.text = ""
        self.last_id = "0-0"

    def add(self, entries: Sequence[tuple[bytes, Mapping[bytes, bytes]]]) -> str:
        """What entries of the job's stream add to the text."""
        before = len(self.text)
        for entry_id, fields in entries:
            self.last_id = entry_id.decode()
            piece, at = fields[b"text"].decode(), int(fields[b"at"])
            if at <= len(self.text):
                self.text += piece[len(self.text) - at :]
        return self.text[before:]

    def rest(self, whole: str) -> str:
        """What the result has beyond the pieces; if it is another text, all of it on a new line."""
        if whole.startswith(self.text):
            return whole[len(self.text) :]
        log.warning(
            "job %s: its result is not the text streamed so far (%d characters), since another "
            "kind of worker finished it; the whole result follows",
            self._job_id,
            len(self.text),
        )
        return f"\n{whole}"


@dataclass(frozen=True, slots=True)
class JobState:
    """What Redis says of a job.

    Attributes:
        status: RQ's; None where there is no such job.
        expired_s: when its result went, in Unix seconds, where that is known.
        entry_id, entry: the newest in its result stream.
    """

    status: str | None
    expired_s: float | None = None
    entry_id: str | None = None
    entry: Mapping[bytes, bytes] | None = None

    @property
    def is_final(self) -> bool:
        """Whether waiting on would change nothing."""
        return self.status is None or self.status in FINAL_STATUSES


@dataclass(frozen=True, slots=True)
class ListedJob:
    """A job at a glance: its status (None: gone), and the kind of workers it is bound to."""

    status: str | None
    fingerprint: str | None = None


def listed_job(status: bytes | None, meta: bytes | None) -> ListedJob:
    """A job from those two fields of its hash."""
    if status is None:
        return ListedJob(None)
    facts = json.loads(meta or b"{}")
    return ListedJob(status.decode(errors="replace"), facts.get("fingerprint"))


def state_commands(job_id: str) -> tuple[Command, Command, Command]:
    """What to ask, in one transaction: a status without the entry written with it would mislead."""
    return (
        ("HGET", RQJob.key_for(job_id), "status"),
        ("XREVRANGE", results_key(job_id), "+", "-", "COUNT", 1),
        ("ZSCORE", EXPIRIES_KEY, job_id),
    )


def state_reads(job_ids: Sequence[str]) -> Iterator[tuple[Sequence[str], list[Command]]]:
    """Ids with the commands that ask for their states, as many as one transaction should hold."""
    for start in range(0, len(job_ids), MAX_STATES_PER_READ):
        some = job_ids[start : start + MAX_STATES_PER_READ]
        yield some, [command for job_id in some for command in state_commands(job_id)]


def result_streams(states: Mapping[str, JobState]) -> dict[Any, Any]:
    """What XREAD has to be asked to hear of the next result of each of these jobs."""
    return {results_key(job_id): state.entry_id or "0-0" for job_id, state in states.items()}


def read_states(job_ids: Sequence[str], replies: Sequence[Any]) -> dict[str, JobState]:
    """The states of jobs from the replies to their `state_commands`, one after the other."""
    states = {}
    each = zip(job_ids, replies[::3], replies[1::3], replies[2::3], strict=True)
    for job_id, status, entries, expired_s in each:
        entry_id, entry = entries[0] if entries else (b"", None)
        text = None if status is None else status.decode(errors="replace")
        states[job_id] = JobState(text, expired_s, entry_id.decode() or None, entry)
    return states


def read_job_result(state: JobState, job_id: str) -> JobResult:
    """All results of a final job.

    Raises:
        Cancelled: it was cancelled or stopped. Expired: it is gone. GenerationFailed: it failed.
    """
    if state.status is None:
        raise Expired(_gone_text(job_id, state.expired_s))
    if state.status in {"canceled", "stopped"}:
        raise Cancelled(f"job {job_id} was cancelled")
    entry = state.entry or {}
    if state.status == "failed" or b"return_value" not in entry:
        raise GenerationFailed(_failure_text(entry, job_id), code="job_failed", retryable=True)
    try:
        return parse(JobResult, json.loads(base64.b64decode(entry[b"return_value"])))
    except (binascii.Error, ValueError, RecursionError) as error:
        raise GenerationFailed(
            f"job {job_id} holds a result that is not in the wire format: {error}",
            code="bad_result",
        ) from None


def result_of(handle: Handle, job: JobResult) -> GenerationResult:
    """The result of one handle's request, raising the error that it carries, if any."""
    if handle.index >= len(job.results):
        raise InvalidRequest(f"{handle} is out of range: the job has {len(job.results)} requests")
    result = job.results[handle.index]
    if result.error is not None:
        raise error_from(result.error, str(handle))
    return result


def error_from(error: ResultError, handle: str) -> ShoalError:
    """The exception that stands for a result's error."""
    text = f"{handle}: {error.message}"
    match error.code:
        case "cancelled":
            return Cancelled(text)
        case "expired":
            return Expired(text)
        case "prompt_too_long":
            return PromptTooLong(text)
        case "invalid_request":
            return InvalidRequest(text)
        case "model_mismatch":
            return ModelMismatch(text, code=error.code)
        case _:
            return GenerationFailed(text, code=error.code, retryable=error.retryable)


def _gone_text(job_id: str, expired_s: float | None) -> str:
    if expired_s is None:
        return f"no job {job_id}: it was never submitted here, or deleted, or gone for over a day"
    when = datetime.fromtimestamp(expired_s, UTC).isoformat(sep=" ", timespec="seconds")
    return f"the result of job {job_id} expired at {when}; ask for a longer result_ttl"


def _failure_text(entry: Mapping[bytes, bytes], job_id: str) -> str:
    packed = entry.get(b"exc_string", b"")
    try:
        reason = zlib.decompress(base64.b64decode(packed)).decode() if packed else ""
    except (binascii.Error, zlib.error, UnicodeDecodeError):
        reason = ""
    last_line = reason.strip().rpartition("\n")[2] or "no reason was recorded"
    return f"job {job_id} failed: {last_line}"
