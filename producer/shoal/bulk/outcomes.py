"""What became of each request of a job, whatever it was: a result, with its error inside.

Also for a job that ended as a whole: cancelled, failed or gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import Cancelled, Expired, GenerationFailed, ShoalError
from shoal.job_states import JobState, read_job_result
from shoal.wire import GenerationResult, ResultError


def results_of(state: JobState, job_id: str, ids: Sequence[str]) -> list[GenerationResult]:
    """One result for each request of a final job, in order, under these ids."""
    try:
        results = read_job_result(state, job_id).results
    except ShoalError as error:
        return [GenerationResult(id=one, error=result_error(error)) for one in ids]
    if len(results) != len(ids):
        text = f"job {job_id} answered {len(results)} of {len(ids)} requests"
        bad = ResultError(code="bad_result", message=text)
        return [GenerationResult(id=one, error=bad) for one in ids]
    return results


def result_error(error: ShoalError) -> ResultError:
    """An exception as the error that a result carries."""
    match error:
        case Cancelled():
            return ResultError(code="cancelled", message=str(error))
        case Expired():
            # A job that is gone was never answered: deleted, or lost with its server.
            return ResultError(code="expired", message=str(error), retryable=True)
        case GenerationFailed(code=code, retryable=retryable):
            return ResultError(code=code, message=str(error), retryable=retryable)
        case _:
            return ResultError(code="generation_failed", message=str(error))
