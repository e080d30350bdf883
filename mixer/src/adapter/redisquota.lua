-- Takes an amount from one counter, in one step for all who share it. Redis' clock is the only one.
-- KEYS[1]  the counter: a string (fixed window) or a hash of slots (rolling window)
-- KEYS[2]  what this request was granted before
-- ARGV     amount, best effort (0, 1), limit, window in ms, slot in ms (0: fixed window),
--          for how long the request is remembered in ms (0: not at all)
-- Returns  {granted, left, ms until more is there}
local counter, before = KEYS[1], KEYS[2]
local amount, best_effort = tonumber(ARGV[1]), ARGV[2] == '1'
local limit, window, width, memory = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local function int(n) return string.format('%.0f', n) end

local taken, reset, slot = 0, 0, 0
if width == 0 then
  taken = tonumber(redis.call('GET', counter) or '0')
  local ttl = redis.call('PTTL', counter)
  if ttl == -1 then -- somebody took its expiry away
    redis.call('PEXPIRE', counter, int(window))
    ttl = window
  end
  if ttl > 0 then reset = ttl end
else
  local clock = redis.call('TIME')
  local now = tonumber(clock[1]) * 1000 + math.floor(tonumber(clock[2]) / 1000)
  slot = math.floor(now / width)
  local first = math.floor((now - window) / width) -- the oldest slot that may hold a grant within the window
  local state = redis.call('HMGET', counter, 'taken', 'oldest')
  taken = tonumber(state[1] or '0')
  local oldest = tonumber(state[2] or slot)
  while oldest < first and taken > 0 do
    local gone = redis.call('HGET', counter, int(oldest))
    if gone then
      taken = taken - tonumber(gone)
      redis.call('HDEL', counter, int(oldest))
    end
    oldest = oldest + 1
  end
  if taken <= 0 then
    redis.call('DEL', counter)
    taken, oldest = 0, slot
  else
    while oldest < slot and redis.call('HEXISTS', counter, int(oldest)) == 0 do
      oldest = oldest + 1
    end
    redis.call('HSET', counter, 'taken', int(taken), 'oldest', int(oldest))
    reset = (oldest + 1) * width + window - now
  end
end

local known = memory > 0 and redis.call('GET', before)
if known then
  return {tonumber(known), math.max(limit - taken, 0), reset}
end

local granted = amount
if amount > limit - taken then
  granted = best_effort and math.max(limit - taken, 0) or 0
end
if granted > 0 then
  taken = taken + granted
  if width == 0 then
    redis.call('INCRBY', counter, int(granted))
    if reset == 0 then
      redis.call('PEXPIRE', counter, int(window))
      reset = window
    end
  else
    redis.call('HINCRBY', counter, int(slot), int(granted))
    redis.call('HSET', counter, 'taken', int(taken))
    redis.call('HSETNX', counter, 'oldest', int(slot))
    redis.call('PEXPIRE', counter, int(window + width))
    if reset == 0 then reset = width + window end
  end
end
if memory > 0 then
  redis.call('SET', before, int(granted), 'PX', int(memory))
end
return {granted, math.max(limit - taken, 0), reset}
