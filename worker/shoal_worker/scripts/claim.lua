-- Takes jobs for the free capacity, queue by queue in priority order, and starts each in the same
-- step: its execution, its place in RQ's registries, its status and our lease. So no job is ever
-- in between, whatever dies when. A claim whose reply was lost is repeated with its id, and then
-- returns what it took.
-- KEYS[1]    the sorted set of leases; KEYS[2..] the queues' lists, most urgent first
-- ARGV       RQ's prefix, worker name, free capacity in requests (negative where a large job passed
--            the limit), what the first queue may take all the same, free capacity in tokens, most ids looked at, lease in seconds, seconds RQ's own
--            entry is kept ahead, start time as RQ writes it, id of this claim, whether it is
--            repeated ('1'), fingerprint of what runs the jobs, then for each queue how many of its
--            ids to leave out: those that the last claim saw and left
-- Returns    {execution id, job id, hash as a flat list, requests, tokens}, ... and last
--            {ids dropped, jobs skipped, whether there may be ids that were not looked at (1), then for
--            each queue how many ids the next claim may leave out}
local prefix, worker = ARGV[1], ARGV[2]
local room, reserved, tokens_left = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
local ids_left, lease_s, ahead_s = tonumber(ARGV[6]), tonumber(ARGV[7]), tonumber(ARGV[8])
local started_at, claim_id, is_repeated, fingerprint = ARGV[9], ARGV[10], ARGV[11] == '1', ARGV[12]
local time = redis.call('TIME')
local now = tonumber(time[1]) + tonumber(time[2]) / 1000000
local of_worker = prefix .. ':worker:' .. worker .. ':executions'
local claimed, num_dropped, num_skipped = {}, 0, 0

-- The plain JSON that its producer wrote; another client's may be anything.
local function facts(text)
  local ok, meta = pcall(cjson.decode, text or '{}')
  if not ok or type(meta) ~= 'table' then meta = {} end
  local requests, tokens = tonumber(meta['requests']), tonumber(meta['tokens'])
  if not (requests and requests >= 1 and requests < 1e6) then requests = 1 end
  if not (tokens and tokens >= 0 and tokens < 1e9) then tokens = 0 end
  return math.floor(requests), math.floor(tokens), meta['fingerprint']
end

-- RQ runs what is in a queue. A job that was saved and then pushed by hand has never been 'queued'.
local function waits(status, origin)
  return status == 'queued' or status == 'created' or (not status and origin)
end

local function start(id, key, origin)
  local execution = claim_id .. string.format('%04x', #claimed)
  local composite = id .. ':' .. execution
  local execution_key = prefix .. ':execution:' .. composite
  local of_job = prefix .. ':executions:' .. id
  redis.call('HSET', execution_key, 'id', execution, 'job_id', id, 'created_at', now,
    'last_heartbeat', now, 'worker_name', worker)
  redis.call('EXPIRE', execution_key, ahead_s)
  redis.call('ZADD', of_job, now + ahead_s, execution)
  redis.call('EXPIRE', of_job, ahead_s + 60)
  redis.call('ZADD', prefix .. ':wip:' .. origin, now + ahead_s, composite)
  redis.call('SADD', of_worker, composite)
  redis.call('EXPIRE', of_worker, ahead_s + 60)
  redis.call('HSET', key, 'status', 'started', 'started_at', started_at,
    'last_heartbeat', started_at, 'worker_name', worker)
  redis.call('PERSIST', key)
  redis.call('ZADD', KEYS[1], now + lease_s, composite)
  return execution
end

local function take_again()
  for _, composite in ipairs(redis.call('SMEMBERS', of_worker)) do
    local id, execution = string.match(composite, '^(.*):([^:]*)$')
    if string.sub(execution, 1, #claim_id) == claim_id then
      local hash = redis.pcall('HGETALL', prefix .. ':job:' .. id)
      local meta = redis.pcall('HGET', prefix .. ':job:' .. id, 'meta')
      if not hash.err and #hash > 0 then
        local requests, tokens = facts(type(meta) == 'string' and meta)
        redis.call('ZADD', KEYS[1], now + lease_s, composite)
        claimed[#claimed + 1] = {execution, id, hash, requests, tokens}
      end
    end
  end
end

local function drop(queue, id, at)
  if at == 0 then redis.call('LPOP', queue) else redis.call('LREM', queue, 1, id) end
end

-- The first queue may use what is reserved; the others must leave it.
local function has_room(is_first)
  if is_first and reserved > 0 then return true end
  return tokens_left > 0 and room > (is_first and 0 or math.max(reserved, 0))
end

-- Ids of jobs that are bound to another fingerprint stay in their place.
local function take_from(queue, is_first, at)
  while has_room(is_first) do
    if ids_left == 0 then return at end
    local id = redis.call('LINDEX', queue, at)
    if not id then return 0 end
    ids_left = ids_left - 1
    local key = prefix .. ':job:' .. id
    local fields = redis.pcall('HMGET', key, 'status', 'meta', 'origin')
    -- An id without a waiting job was deleted, cancelled, is in the list twice, or is no job.
    if fields.err or not waits(fields[1], fields[3]) then
      drop(queue, id, at)
      num_dropped = num_dropped + 1
    else
      local requests, tokens, bound_to = facts(fields[2])
      if type(bound_to) == 'string' and bound_to ~= fingerprint then
        num_skipped, at = num_skipped + 1, at + 1
      else
        drop(queue, id, at)
        local execution = start(id, key, fields[3] or '')
        room, tokens_left = room - requests, tokens_left - tokens
        if is_first then reserved = reserved - requests end
        claimed[#claimed + 1] = {execution, id, redis.call('HGETALL', key), requests, tokens}
      end
    end
  end
  return 0
end

-- A full Redis refuses a script only before its first write, and LPOP it allows. This it refuses.
redis.call('SET', prefix .. ':shoal:not-full', 1, 'EX', 3600)
if is_repeated then take_again() end
local left_out = {}
if #claimed == 0 then
  for q = 2, #KEYS do left_out[q - 1] = take_from(KEYS[q], q == 2, tonumber(ARGV[11 + q])) end
end
claimed[#claimed + 1] = {num_dropped, num_skipped, ids_left == 0 and 1 or 0, unpack(left_out)}
return claimed
