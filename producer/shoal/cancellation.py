"""Cancelling a job, or one request of it, in the same step that sees whether it has ended.

Owns the two scripts and what RQ writes when a job is cancelled, collected from RQ's own classes on
a pipeline that is never executed. It sends nothing, so the blocking and the asyncio client share
all of it.
"""

from __future__ import annotations

from typing import Any

from rq import Queue
from rq.defaults import RQ_KEY_PREFIX
from rq.job import Job as RQJob
from rq.job import JobStatus
from rq.serializers import JSONSerializer

from shoal.jobs import Command, Handle, cancel_key, offline, results_key, script_words, stream_key

# RQ keeps a cancelled job, and with it the prompt, for ever; and an idempotency key would name it
# for ever.
CANCEL_TTL_S = 86_400
MAX_TRIMMED = 100  # Entries of jobs long gone, taken off the list of cancelled ones at each cancel.

# A worker may commit the job, or claim it, between any two commands of ours: so what RQ writes for
# a cancelled job is written only where this script finds the job not ended. RQ's list of cancelled
# jobs is never cleaned up by RQ: what a day has made of them is looked at here.
# KEYS: the job's hash, its executions, the queue's started and its cancelled jobs.
# ARGV: job id, seconds that a cancelled job is kept, most entries to trim, commands as for
# ENQUEUE_ONCE.
CANCEL_JOB = """
local status = redis.call('HGET', KEYS[1], 'status')
if not status or status == 'finished' or status == 'failed' or status == 'canceled'
  or status == 'stopped' then return 0 end
local at = 4
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  redis.call(unpack(ARGV, at + 1, last))
  at = last + 1
end
for _, execution in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  redis.call('ZREM', KEYS[3], ARGV[1] .. ':' .. execution)
end
local prefix = string.sub(KEYS[1], 1, -1 - #ARGV[1])
local old = tonumber(redis.call('TIME')[1]) - tonumber(ARGV[2])
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[4], '-inf', old, 'LIMIT', 0, ARGV[3])) do
  if redis.call('EXISTS', prefix .. id) == 0 then redis.call('ZREM', KEYS[4], id) end
end
return 1
"""

# Marks one request of a job that has not ended; the worker reads the marks when it renews its
# leases. KEYS: the job's hash, the set of marks. ARGV: index, seconds that the marks are kept.
CANCEL_REQUEST = """
local status = redis.call('HGET', KEYS[1], 'status')
if not status or status == 'finished' or status == 'failed' or status == 'canceled'
  or status == 'stopped' then return 0 end
redis.call('SADD', KEYS[2], ARGV[1])
redis.call('EXPIRE', KEYS[2], ARGV[2])
return 1
"""


def cancel_request_arguments(handle: Handle) -> tuple[list[str], list[Any]]:
    """The keys and arguments of CANCEL_REQUEST."""
    keys = [RQJob.key_for(handle.job_id), cancel_key(handle.job_id)]
    return keys, [handle.index, CANCEL_TTL_S]


def cancel_job_arguments(job_id: str, queue_name: str) -> tuple[list[str], list[Any]]:
    """The keys and arguments of CANCEL_JOB for a job that was enqueued to this queue."""
    keys = [
        RQJob.key_for(job_id),
        f"{RQ_KEY_PREFIX}:executions:{job_id}",
        f"{RQ_KEY_PREFIX}:wip:{queue_name}",
        f"{RQ_KEY_PREFIX}:canceled:{queue_name}",
    ]
    commands = _cancel_commands(job_id, queue_name)
    return keys, [job_id, CANCEL_TTL_S, MAX_TRIMMED, *script_words(commands)]


def _cancel_commands(job_id: str, queue_name: str) -> tuple[Command, ...]:
    """What RQ writes when a job is cancelled, whichever of its lists it is on, and the expiries.

    As `rq.job.cancel_job` does by default, the job's dependents are left as they are.
    """
    queue = Queue(queue_name, connection=offline(), serializer=JSONSerializer)
    job = RQJob(job_id, connection=offline(), serializer=JSONSerializer)
    pipeline = offline().pipeline()
    job.set_status(JobStatus.CANCELED, pipeline=pipeline)
    queue.remove(job, pipeline=pipeline)
    for registry in (
        queue.deferred_job_registry,
        queue.ready_job_registry,
        queue.scheduled_job_registry,
    ):
        registry.remove(job, pipeline=pipeline)
    queue.canceled_job_registry.add(job, pipeline=pipeline)
    job.cleanup(CANCEL_TTL_S, pipeline=pipeline, remove_from_queue=False)
    for key in (results_key(job_id), stream_key(job_id), cancel_key(job_id)):
        pipeline.expire(key, CANCEL_TTL_S)
    return tuple(tuple(args) for args, _options in pipeline.command_stack)
