-- Runs each job's commands if the job is still ours to end: started, by this worker, in this
-- execution. A worker that lost its lease and comes back late is refused here, job by job.
-- KEYS[1]    the sorted set of leases; KEYS[2] of results, by the time they go
-- ARGV       RQ's prefix, worker name, then for each job: job id, execution id, queue, seconds its
--            result is kept (0: say nothing), number of commands, and for each command its number
--            of words and the words
-- Returns    1 for each job whose commands ran, 0 for each that was refused
local prefix, worker = ARGV[1], ARGV[2]
local now = tonumber(redis.call('TIME')[1])
local answers, at = {}, 3
while at <= #ARGV do
  local id, execution, queue = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local composite = id .. ':' .. execution
  local fields = redis.call('HMGET', prefix .. ':job:' .. id, 'status', 'worker_name')
  local ours = fields[1] == 'started' and fields[2] == worker
    and redis.call('ZSCORE', prefix .. ':wip:' .. queue, composite)
  local kept_s, num_commands = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 4])
  at = at + 5
  for _ = 1, num_commands do
    local last = at + tonumber(ARGV[at])
    if ours then redis.call(unpack(ARGV, at + 1, last)) end
    at = last + 1
  end
  redis.call('ZREM', KEYS[1], composite)
  if ours then
    redis.call('DEL', prefix .. ':shoal:cancel:' .. id)
    -- For a day after, whoever asks too late is told when the result went.
    if kept_s > 0 then redis.call('ZADD', KEYS[2], now + kept_s, id) end
  end
  answers[#answers + 1] = ours and 1 or 0
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 86400)
return answers
