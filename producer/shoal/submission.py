"""What the clients' verbs are given, as jobs to send: one prompt, many requests, an endless input.

Pure, so that the blocking and the asyncio client differ in nothing but the sending.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice

from shoal.jobs import (
    MAX_PACK_REQUESTS,
    OutgoingJob,
    make_request,
    new_job_id,
    outgoing_job,
    pack,
)
from shoal.wire import GenerationRequest, SamplingParams


def single_job(
    prompt: str | list[int],
    sampling: SamplingParams | None,
    fields: Mapping[str, object],
    *,
    queue: str,
    result_ttl_s: int,
    idempotency_key: str | None,
    **options: object,
) -> OutgoingJob:
    """One prompt as a job of its own; `options` are the request's fields beside its sampling.

    Raises:
        InvalidRequest: a field is unknown, of the wrong type or out of range.
    """
    request = make_request(prompt, sampling, fields=fields, **options)
    job_id = new_job_id(idempotency_key)
    return outgoing_job([request], queue=queue, job_id=job_id, result_ttl_s=result_ttl_s)


def packed_jobs(
    requests: Iterable[GenerationRequest | str],
    *,
    queue: str,
    result_ttl_s: int,
    requests_per_job: int = MAX_PACK_REQUESTS,
    stream: bool = False,
    fingerprint: str | None = None,
) -> list[OutgoingJob]:
    """Requests, in order, packed into jobs; a text is a request with sampling by default.

    Raises:
        InvalidRequest: one of them is wrong; then there are no jobs at all.
    """
    checked = [make_request(r) if isinstance(r, str) else r for r in requests]
    return [
        outgoing_job(
            group, queue=queue, result_ttl_s=result_ttl_s, stream=stream, fingerprint=fingerprint
        )
        for group in pack(checked, requests_per_job)
    ]


class RequestGroups:
    """An input of any length in groups, each given out when there is room for it in flight.

    Attributes:
        size: requests a group, and a job.
    """

    def __init__(self, requests: Iterator[GenerationRequest], max_in_flight: int) -> None:
        # Eight jobs or more in flight keep workers fed.
        self.size = max(1, min(MAX_PACK_REQUESTS, max_in_flight // 8))
        self._max_in_flight = max(max_in_flight, self.size)
        self._requests = requests

    def take(self, num_in_flight: int) -> list[GenerationRequest]:
        """The next group; empty if there is no room for it, or if the input has ended."""
        if num_in_flight + self.size > self._max_in_flight:
            return []
        return list(islice(self._requests, self.size))
