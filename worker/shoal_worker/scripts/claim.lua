-- Takes jobs for the free capacity, queue by queue in priority order, and starts each in the same
-- step: its execution, its place in RQ's registries, its status and our lease. So no job is ever
-- in between, whatever dies when.
-- KEYS[1]    the sorted set of leases; KEYS[2..] the queues' lists, most urgent first
-- ARGV       RQ's prefix, worker name, capacity in requests, most jobs, lease in seconds,
--            seconds RQ's own entry is kept ahead, start time as RQ writes it, id of this claim
-- Returns    {execution id, job id, hash as a flat list}, ... and last the ids that were dropped
local prefix, worker, capacity, max_jobs = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local lease_s, ahead_s, started_at, claim_id = tonumber(ARGV[5]), tonumber(ARGV[6]), ARGV[7], ARGV[8]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local claimed, dropped = {}, {}

local function num_requests(meta)
  local ok, parsed = pcall(cjson.decode, meta or '{}')
  return ok and type(parsed) == 'table' and tonumber(parsed['requests']) or 1
end

for q = 2, #KEYS do
  while capacity > 0 and #claimed < max_jobs do
    local id = redis.call('LPOP', KEYS[q])
    if not id then break end
    local key = prefix .. ':job:' .. id
    local fields = redis.call('HMGET', key, 'status', 'meta', 'origin')
    -- An id without a waiting job was deleted, cancelled, or is in the list twice.
    if fields[1] == 'queued' then
      local execution = claim_id .. string.format('%04x', #claimed)
      local composite = id .. ':' .. execution
      local execution_key = prefix .. ':execution:' .. composite
      local of_job = prefix .. ':executions:' .. id
      local of_worker = prefix .. ':worker:' .. worker .. ':executions'
      redis.call('HSET', execution_key, 'id', execution, 'job_id', id, 'created_at', now,
        'last_heartbeat', now, 'worker_name', worker)
      redis.call('EXPIRE', execution_key, ahead_s)
      redis.call('ZADD', of_job, now + ahead_s, execution)
      redis.call('EXPIRE', of_job, ahead_s + 60)
      redis.call('ZADD', prefix .. ':wip:' .. (fields[3] or ''), now + ahead_s, composite)
      redis.call('SADD', of_worker, composite)
      redis.call('EXPIRE', of_worker, ahead_s + 60)
      redis.call('HSET', key, 'status', 'started', 'started_at', started_at,
        'last_heartbeat', started_at, 'worker_name', worker)
      redis.call('PERSIST', key)
      redis.call('ZADD', KEYS[1], now + lease_s, composite)
      capacity = capacity - num_requests(fields[2])
      claimed[#claimed + 1] = {execution, id, redis.call('HGETALL', key)}
    else
      dropped[#dropped + 1] = id
    end
  end
end
claimed[#claimed + 1] = dropped
return claimed
