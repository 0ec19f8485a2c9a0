"""What became of each request of a job, whatever it was: a result, with its error inside.

Also for a job that ended as a whole: cancelled, failed or gone.
"""

from __future__ import annotations

from collections.abc import Sequence

from shoal.errors import Cancelled, Expired, GenerationFailed, ShoalError
from shoal.job_states import JobState, read_job_result
from shoal.wire import GenerationResult, ResultError


def results_of(
    state: JobState, job_id: str, ids: Sequence[str | None], *, has_more: bool = False
) -> list[GenerationResult]:
    """One result for each request of a final job, in order, under these ids; None: any.

    Args:
        has_more: the ids are those of the last requests, and there may be others before them.
    """
    try:
        results = read_job_result(state, job_id).results
    except ShoalError as error:
        return [GenerationResult(id=one or "", error=result_error(error)) for one in ids]
    # What an earlier start has sent is sent again if it does not fit; what was sent now would not
    # fit the next time either.
    if has_more:
        results = results[-len(ids) :]
        fits = len(results) == len(ids) and all(
            one in {None, result.id} for one, result in zip(ids, results, strict=True)
        )
    else:
        fits = len(results) == len(ids)
    if not fits:
        text = f"job {job_id} answered other requests than these {len(ids)}"
        bad = ResultError(code="bad_result", message=text, retryable=has_more)
        return [GenerationResult(id=one or "", error=bad) for one in ids]
    return results


def lost_result(request_id: str, num_losses: int) -> GenerationResult:
    """What is said of a request whose job was gone so often that it is not sent again."""
    text = f"its job was gone from Redis {num_losses} times without an answer"
    return GenerationResult(id=request_id, error=ResultError(code="expired", message=text))


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
