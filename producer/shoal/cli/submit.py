"""`shoal submit`, `shoal result` and `shoal cancel`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import click

from shoal.bulk.outcomes import results_of
from shoal.cli.exits import EXIT_DONE, EXIT_SOME_FAILED, note
from shoal.cli.options import common_options, given_sampling, model_option, sampling_options
from shoal.cli.serving import Serving, connected
from shoal.cli.show import COMPLETION_STYLE, PROMPT_STYLE, output_console, print_json, print_result
from shoal.client import Client, Job
from shoal.errors import (
    Cancelled,
    Expired,
    GenerationFailed,
    InvalidRequest,
    ResultTimeout,
)
from shoal.job_states import JobState, read_job_result
from shoal.jobs import Handle, make_request
from shoal.status import live_workers, queue_of
from shoal.wire import QUEUE_DEFAULT, GenerationRequest, GenerationResult

POLL_S = 1.0


@click.command()
@click.argument("prompts", nargs=-1, required=True, metavar="PROMPT...")
@click.option("--queue", default=QUEUE_DEFAULT, show_default=True, help="Where to submit.")
@click.option("--no-wait", is_flag=True, help="Print job ids and leave; `shoal result` fetches.")
@click.option("--stream", is_flag=True, help="Print the text as it is made; for one prompt.")
@click.option("--json", "as_json", is_flag=True, help="Print one GenerationResult a line.")
@model_option
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds to wait.")
@click.option(
    "--deadline", type=float, metavar="S", help="Seconds after which a request ends as it is."
)
@click.option("--id", "request_id", help="The request's id in its result; for one prompt.")
@sampling_options()
@common_options
def submit(
    prompts: tuple[str, ...],
    queue: str,
    *,
    no_wait: bool,
    stream: bool,
    as_json: bool,
    model: str | None,
    timeout: float | None,
    deadline: float | None,
    request_id: str | None,
    redis_url: str | None,
    **sampling: Any,
) -> int:
    """Submit prompts, wait, print completions.

    A single `-` reads the prompts from the lines of standard input.
    """
    texts = _stdin_lines() if prompts == ("-",) else list(prompts)
    if len(texts) > 1 and (stream or request_id is not None):
        option = "--stream" if stream else "--id"
        raise click.UsageError(f"{option} is for one prompt; there are {len(texts)}")
    if stream and (as_json or no_wait):
        raise click.UsageError(
            "--stream prints text as it is made, so neither --json nor --no-wait"
        )
    fields = given_sampling(sampling)
    requests = [
        make_request(text, fields=fields, deadline=deadline, id=request_id) for text in texts
    ]
    with connected(redis_url) as client:
        if no_wait:
            return _leave(client, requests, queue, model)
        with Serving(client, queue, model) as serving:
            requests = _for_model(requests, serving.requested_model())
            if stream:
                return _stream(client, requests[0], queue, serving, timeout)
            results = _generate(client, requests, queue, serving, timeout)
    return _print_all(results, as_json=as_json)


@click.command()
@click.argument("job_id")
@click.option("--json", "as_json", is_flag=True, help="Print one GenerationResult a line.")
@click.option("--timeout", type=click.FloatRange(min=0), metavar="S", help="Seconds to wait.")
@common_options
def result(job_id: str, *, as_json: bool, timeout: float | None, redis_url: str | None) -> int:
    """Wait for a job submitted earlier, print its result."""
    handle = Handle.parse(job_id)
    with connected(redis_url) as client:
        state = client.state(handle.job_id)
        if not state.is_final:
            queue = queue_of(client.redis, handle.job_id) or QUEUE_DEFAULT
            with Serving(client, queue, None, may_start=False) as serving:
                state = _wait(client, [handle.job_id], timeout, serving.watch)[handle.job_id]
    return _print_all(_results_of_handle(state, handle, job_id), as_json=as_json)


@click.command()
@click.argument("job_id")
@common_options
def cancel(job_id: str, redis_url: str | None) -> int:
    """Cancel a job, or one request of it (JOB_ID:INDEX)."""
    with connected(redis_url) as client:
        job = client.job(job_id)
        if job.cancel():
            click.echo(f"cancelled {job_id}")
            return EXIT_DONE
        status = job.status
    if status == "missing":
        raise Expired(f"no job {job_id}: it was never submitted here, or is no longer kept")
    click.echo(f"{job_id} had ended before: {status}")
    return EXIT_DONE


def _stdin_lines() -> list[str]:
    lines = sys.stdin.buffer.read().split(b"\n")
    texts = []
    for number, line in enumerate(lines, start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeDecodeError:
            raise InvalidRequest(f"line {number} of standard input is not UTF-8") from None
        if text.strip():
            texts.append(text)
    return texts


def _for_model(requests: list[GenerationRequest], model: str | None) -> list[GenerationRequest]:
    return [request.model_copy(update={"model": model}) for request in requests]


def _leave(client: Client, requests: list[GenerationRequest], queue: str, model: str | None) -> int:
    """Submit, print ids, don't wait."""
    if client.is_embedded and not live_workers(client.redis, queue):
        raise InvalidRequest(
            "nobody would do it: no worker uses the embedded Redis. Start one first "
            "(`shoal worker --model demo`), or leave --no-wait out"
        )
    with Serving(client, queue, model, may_start=False) as serving:
        jobs = client.submit_many(_for_model(requests, serving.requested_model()), queue=queue)
    for job in jobs:
        click.echo(job.id)
    return EXIT_DONE


def _generate(
    client: Client,
    requests: list[GenerationRequest],
    queue: str,
    serving: Serving,
    timeout_s: float | None,
) -> list[GenerationResult]:
    """Submit all together and wait; who stops waiting takes back what nobody could fetch."""
    jobs = client.submit_many(requests, queue=queue)
    job_ids = list(dict.fromkeys(job.handle.job_id for job in jobs))
    try:
        states = _wait(client, job_ids, timeout_s, serving.watch)
    except ResultTimeout as error:
        if serving.has_local:
            _cancel(client, job_ids)
            raise ResultTimeout(f"{error}; the worker started for it ends with it") from None
        raise ResultTimeout(f"{error}; it goes on: shoal result {' '.join(job_ids[:3])}") from None
    except BaseException:
        _cancel(client, job_ids)  # Also on a signal: the ids were not shown to anybody.
        raise
    results = []
    for job_id, group in groupby(jobs, key=lambda job: job.handle.job_id):
        results += _with_prompts(states[job_id], list(group))
    return results


def _wait(
    client: Client, job_ids: Sequence[str], timeout_s: float | None, watch: Callable[[], None]
) -> dict[str, JobState]:
    """The states of all these jobs once all have ended."""
    end_s = None if timeout_s is None else time.monotonic() + timeout_s
    ended: dict[str, JobState] = {}
    while len(ended) < len(job_ids):
        left_s = POLL_S if end_s is None else end_s - time.monotonic()
        waiting = [job_id for job_id in job_ids if job_id not in ended]
        # Looked at once more when the time is up, so that a time-out of 0 asks what is there.
        ended |= client.ended(waiting, max(0.0, min(left_s, POLL_S)))
        if left_s <= 0 and len(ended) < len(job_ids):
            raise ResultTimeout(f"no result of {waiting[0]} within {timeout_s:g} s")
        watch()
    return ended


def _stream(
    client: Client,
    request: GenerationRequest,
    queue: str,
    serving: Serving,
    timeout_s: float | None,
) -> int:
    console = output_console()
    (job,) = client.submit_many([request], queue=queue, stream=True)
    console.print(request.prompt, style=PROMPT_STYLE, end="", soft_wrap=True)
    try:
        for delta in client.follow(job, timeout_s, on_idle=serving.watch):
            console.print(delta, style=COMPLETION_STYLE, end="", soft_wrap=True)
            console.file.flush()
    except (GenerationFailed, Cancelled, Expired, InvalidRequest) as error:
        note(str(error))
        return EXIT_SOME_FAILED
    except BaseException:
        _cancel(client, [job.id])
        raise
    finally:
        console.print()
    return EXIT_DONE


def _cancel(client: Client, job_ids: Sequence[str]) -> None:
    for job_id in job_ids:
        client.cancel(Handle(job_id))


def _with_prompts(state: JobState, jobs: Sequence[Job]) -> list[GenerationResult]:
    results = results_of(state, jobs[0].handle.job_id, [job.id for job in jobs])
    return [
        one.model_copy(update={"prompt": job.request.prompt if job.request else None})
        for one, job in zip(results, jobs, strict=True)
    ]


def _results_of_handle(state: JobState, handle: Handle, job_id: str) -> list[GenerationResult]:
    """One request's result, or where only the job is named all of its requests'."""
    results = read_job_result(state, handle.job_id).results
    if handle.num_requests == 1:
        return results
    if handle.index >= len(results):
        raise InvalidRequest(f"{job_id} is out of range: the job has {len(results)} requests")
    return [results[handle.index]]


def _print_all(results: Sequence[GenerationResult], *, as_json: bool) -> int:
    """Results to stdout, what failed to stderr."""
    console = output_console()
    for one in results:
        if as_json:
            print_json(one)
        elif one.error is None:
            print_result(one, console)
        if one.error is not None:
            note(f"{one.id}: {one.error.message}")
    return EXIT_SOME_FAILED if any(one.error for one in results) else EXIT_DONE
