-- Runs each job's commands if the job is still ours to end: started, by this worker, in this
-- execution. A worker that lost its lease and comes back late is refused here, job by job. The
-- answers are kept: a commit whose reply was lost is repeated with its id, and only answered again.
-- KEYS[1]    the sorted set of leases; KEYS[2] of results, by the time they go; KEYS[3] this
--            worker's last answers
-- ARGV       RQ's prefix, worker name, id of this commit, then for each job: job id, execution id,
--            queue, seconds its result is kept (0: say nothing), how it leaves ('back' to its queue,
--            with an 'end', with an end that needs 'rq', or 'gone': it runs anew), number of commands, and for each command
--            its number of words and the words
-- Returns    for each job: 1 where its commands ran, 0 where it was refused, 2 where it is ours but
--            RQ's own functions must end it, be it that other jobs depend on it
local prefix, worker, commit_id = ARGV[1], ARGV[2], ARGV[3]
local now = tonumber(redis.call('TIME')[1])
local last = redis.call('HMGET', KEYS[3], 'id', 'answers')
if last[1] == commit_id then return cjson.decode(last[2]) end
local answers, at = {}, 4

local function clear(id, execution, queue)
  local composite = id .. ':' .. execution
  redis.call('DEL', prefix .. ':execution:' .. composite)
  redis.call('ZREM', prefix .. ':wip:' .. queue, composite)
  redis.call('ZREM', prefix .. ':executions:' .. id, execution)
  redis.call('SREM', prefix .. ':worker:' .. worker .. ':executions', composite)
end

while at <= #ARGV do
  local id, execution, queue, way = ARGV[at], ARGV[at + 1], ARGV[at + 2], ARGV[at + 4]
  local composite = id .. ':' .. execution
  local key = prefix .. ':job:' .. id
  local fields = redis.pcall('HMGET', key, 'status', 'worker_name')
  local answer = 0
  if way ~= 'gone' and not fields.err and fields[1] == 'started' and fields[2] == worker
    and redis.call('ZSCORE', prefix .. ':wip:' .. queue, composite) then
    local has_dependents = way == 'end' and redis.call('EXISTS', key .. ':dependents') == 1
    answer = (way == 'rq' or has_dependents) and 2 or 1
  end
  local kept_s, num_commands = tonumber(ARGV[at + 3]), tonumber(ARGV[at + 5])
  at = at + 6
  for _ = 1, num_commands do
    local last_word = at + tonumber(ARGV[at])
    if answer == 1 then redis.call(unpack(ARGV, at + 1, last_word)) end
    at = last_word + 1
  end
  if answer < 2 then redis.call('ZREM', KEYS[1], composite) end
  if answer == 0 then
    clear(id, execution, queue)
    -- RQ gives a cancelled job no end; its prompts would stay for ever.
    if not fields.err and fields[1] == 'canceled' and redis.call('TTL', key) == -1 then
      redis.call('EXPIRE', key, 86400)
    end
  end
  if answer == 1 and way == 'end' then
    redis.call('DEL', prefix .. ':shoal:cancel:' .. id)
    -- For a day after, whoever asks too late is told when the result went.
    if kept_s > 0 then redis.call('ZADD', KEYS[2], now + kept_s, id) end
  end
  answers[#answers + 1] = answer
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now - 86400)
redis.call('HSET', KEYS[3], 'id', commit_id, 'answers', cjson.encode(answers))
redis.call('EXPIRE', KEYS[3], 3600)
return answers
