-- Renews the leases of one worker's jobs and says which of them are not its any more.
-- KEYS[1]    the sorted set of leases
-- ARGV       RQ's prefix, worker name, lease in seconds, seconds RQ's own entry is kept ahead,
--            then job id, execution id and queue for each job
-- Returns    for each job: {'held' | 'cancelled' | 'lost', indexes of cancelled requests}
local prefix, worker, lease_s, ahead_s = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local answers = {}
for at = 5, #ARGV, 3 do
  local id, execution, queue = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  local composite = id .. ':' .. execution
  local wip = prefix .. ':wip:' .. queue
  local fields = redis.call('HMGET', prefix .. ':job:' .. id, 'status', 'worker_name')
  local answer = 'lost'
  if fields[1] == 'canceled' or not fields[1] then
    answer = 'cancelled'
  elseif fields[1] == 'started' and fields[2] == worker and redis.call('ZSCORE', wip, composite) then
    answer = 'held'
    redis.call('ZADD', KEYS[1], now + lease_s, composite)
    redis.call('ZADD', wip, 'XX', now + ahead_s, composite)
    redis.call('ZADD', prefix .. ':executions:' .. id, 'XX', now + ahead_s, execution)
    redis.call('EXPIRE', prefix .. ':executions:' .. id, ahead_s + 60)
    redis.call('HSET', prefix .. ':execution:' .. composite, 'last_heartbeat', now)
    redis.call('EXPIRE', prefix .. ':execution:' .. composite, ahead_s)
  end
  if answer ~= 'held' then redis.call('ZREM', KEYS[1], composite) end
  answers[#answers + 1] = {answer, redis.call('SMEMBERS', prefix .. ':shoal:cancel:' .. id)}
end
return answers
