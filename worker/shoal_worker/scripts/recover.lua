-- Puts jobs whose lease has run out back to the front of their queues; their worker is dead, or so
-- late that its commit is refused from now on. Nobody is charged: no retry is spent. A job that lost
-- its worker too often is given to the caller, who ends it.
-- KEYS[1]    the sorted set of leases
-- ARGV       RQ's prefix, this worker's name, most jobs, deaths allowed, lease in seconds
-- Returns    {job id, execution id, queue, 'requeued' | 'condemned'}, ...
local prefix, worker, max_jobs = ARGV[1], ARGV[2], tonumber(ARGV[3])
local max_deaths, lease_s = tonumber(ARGV[4]), tonumber(ARGV[5])
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local moved = {}
for _, composite in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, max_jobs)) do
  local id, execution = string.match(composite, '^(.*):([^:]*)$')
  local key = prefix .. ':job:' .. id
  local execution_key = prefix .. ':execution:' .. composite
  local fields = redis.call('HMGET', key, 'status', 'origin', 'worker_name')
  local queue = fields[2] or ''
  local wip = prefix .. ':wip:' .. queue
  redis.call('ZREM', KEYS[1], composite)
  if fields[1] == 'started' and redis.call('ZSCORE', wip, composite) then
    local deaths = redis.call('HINCRBY', key, 'shoal_deaths', 1)
    if fields[3] then
      redis.call('SREM', prefix .. ':worker:' .. fields[3] .. ':executions', composite)
    end
    if deaths > max_deaths then
      redis.call('HSET', key, 'worker_name', worker)
      redis.call('ZADD', KEYS[1], now + lease_s, composite)
      moved[#moved + 1] = {id, execution, queue, 'condemned'}
    else
      redis.call('DEL', execution_key)
      redis.call('ZREM', wip, composite)
      redis.call('ZREM', prefix .. ':executions:' .. id, execution)
      redis.call('HSET', key, 'status', 'queued', 'started_at', '', 'worker_name', '')
      redis.call('LPUSH', prefix .. ':queue:' .. queue, id)
      moved[#moved + 1] = {id, execution, queue, 'requeued'}
    end
  end
end
return moved
