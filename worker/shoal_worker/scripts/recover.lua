-- Puts jobs whose lease has run out back to the front of their queues; their worker is dead, or so
-- late that its commit is refused from now on. Nobody is charged: no retry is spent. Deaths are
-- counted all the same, within the hour: a job that lost two workers is from then on run alone, and
-- charged only for the time when it ran; one that loses too many is given to the caller, who ends it.
-- KEYS[1]    the sorted set of leases
-- ARGV       RQ's prefix, this worker's name, most jobs, deaths allowed, lease in seconds
-- Returns    {job id, execution id, queue, 'requeued' | 'condemned'}, ...
local prefix, worker, max_jobs = ARGV[1], ARGV[2], tonumber(ARGV[3])
local max_deaths, lease_s = tonumber(ARGV[4]), tonumber(ARGV[5])
local run_alone_after, forgotten_after_s = 2, 3600
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local moved, waiting = {}, {}
-- A full Redis refuses a script only before its first write, and ZREM it allows. This it refuses:
-- while holders cannot renew their leases, nobody may take what is overdue.
redis.call('SET', prefix .. ':shoal:not-full', 1, 'EX', 3600)

local function count_death(key)
  local fields = redis.call('HMGET', key, 'shoal_deaths', 'shoal_died_at', 'shoal_exposed')
  local deaths, died_at = tonumber(fields[1]) or 0, tonumber(fields[2]) or 0
  if now - died_at > forgotten_after_s then deaths = 0 end
  if fields[3] ~= '0' then
    deaths = deaths + 1
    redis.call('HSET', key, 'shoal_deaths', deaths, 'shoal_died_at', now)
  end
  if deaths >= run_alone_after then redis.call('HSET', key, 'shoal_exposed', '0') end
  return deaths
end

for _, composite in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, max_jobs)) do
  local id, execution = string.match(composite, '^(.*):([^:]*)$')
  local key = prefix .. ':job:' .. (id or '')
  local fields = redis.pcall('HMGET', key, 'status', 'origin', 'worker_name', 'enqueued_at', 'ttl')
  redis.call('ZREM', KEYS[1], composite)
  local queue = not fields.err and fields[2] or ''
  local wip = prefix .. ':wip:' .. queue
  if not fields.err and fields[1] == 'started' and redis.call('ZSCORE', wip, composite) then
    local deaths = count_death(key)
    if fields[3] then
      redis.call('SREM', prefix .. ':worker:' .. fields[3] .. ':executions', composite)
    end
    if deaths > max_deaths then
      redis.call('HSET', key, 'worker_name', worker)
      redis.call('ZADD', KEYS[1], now + lease_s, composite)
      moved[#moved + 1] = {id, execution, queue, 'condemned'}
    else
      redis.call('DEL', prefix .. ':execution:' .. composite)
      redis.call('ZREM', wip, composite)
      redis.call('ZREM', prefix .. ':executions:' .. id, execution)
      redis.call('HSET', key, 'status', 'queued', 'started_at', '', 'worker_name', '')
      -- Seconds that it may wait; the claim has taken its expiry away.
      local ttl = tonumber(fields[5])
      if ttl and ttl > 0 then redis.call('EXPIRE', key, ttl) end
      waiting[#waiting + 1] = {fields[4] or '', id, prefix .. ':queue:' .. queue}
      moved[#moved + 1] = {id, execution, queue, 'requeued'}
    end
  end
end
-- Last first, so that the one that has waited longest ends up at the front.
table.sort(waiting, function(a, b)
  if a[1] ~= b[1] then return a[1] > b[1] end
  return a[2] > b[2]
end)
for _, job in ipairs(waiting) do redis.call('LPUSH', job[3], job[2]) end
return moved
