-- Says which of one worker's jobs are not its any more or have cancelled requests, and, when it is
-- time for that, renews the leases of the others. Looking is cheaper than writing, and done oftener.
-- KEYS[1]    the sorted set of leases
-- ARGV       RQ's prefix, worker name, lease in seconds, seconds RQ's own entry is kept ahead,
--            seconds a cancelled job is kept, whether leases are renewed ('1'), then for each job:
--            job id, execution id, queue, and whether what runs it has been given it ('1')
-- Returns    for each job: {'held' | 'cancelled' | 'lost', indexes of cancelled requests}
local prefix, worker, lease_s, ahead_s = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local kept_s, renews = ARGV[5], ARGV[6] == '1'
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local answers = {}
for at = 7, #ARGV, 4 do
  local id, execution, queue, is_exposed = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 3]
  local composite = id .. ':' .. execution
  local key, wip = prefix .. ':job:' .. id, prefix .. ':wip:' .. queue
  local of_job, execution_key = prefix .. ':executions:' .. id, prefix .. ':execution:' .. composite
  local fields = redis.pcall('HMGET', key, 'status', 'worker_name', 'shoal_exposed')
  local answer = 'lost'
  if not fields.err then
    if fields[1] == 'canceled' or not fields[1] then
      answer = 'cancelled'
      -- RQ gives a cancelled job no end; its prompts would stay for ever.
      if redis.call('TTL', key) == -1 then redis.call('EXPIRE', key, kept_s) end
    elseif fields[1] == 'started' and fields[2] == worker and redis.call('ZSCORE', wip, composite) then
      answer = 'held'
      if renews then
        redis.call('ZADD', KEYS[1], now + lease_s, composite)
        redis.call('ZADD', wip, 'XX', now + ahead_s, composite)
        redis.call('ZADD', of_job, 'XX', now + ahead_s, execution)
        redis.call('EXPIRE', of_job, ahead_s + 60)
        redis.call('HSET', execution_key, 'last_heartbeat', now)
        redis.call('EXPIRE', execution_key, ahead_s)
      end
      if fields[3] and fields[3] ~= is_exposed then
        redis.call('HSET', key, 'shoal_exposed', is_exposed)
      end
    end
  end
  if answer ~= 'held' then
    redis.call('ZREM', KEYS[1], composite)
    redis.call('DEL', execution_key)
    redis.call('ZREM', wip, composite)
    redis.call('ZREM', of_job, execution)
    redis.call('SREM', prefix .. ':worker:' .. worker .. ':executions', composite)
  end
  answers[#answers + 1] = {answer, redis.call('SMEMBERS', prefix .. ':shoal:cancel:' .. id)}
end
return answers
