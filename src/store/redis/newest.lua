-- A google.protobuf varint as a signed number, exact up to 2^53 either way: four groups of seven bits below, six above,
-- because a double cannot hold 64 bits.
local function varint(text, at)
  local low, high, scale = 0, 0, 1
  for group = 1, 10 do
    local byte = string.byte(text, at)
    if not byte then return nil end
    at = at + 1
    if group <= 4 then low = low + (byte % 128) * scale else high = high + (byte % 128) * scale end
    scale = (group == 4) and 1 or scale * 128
    if byte < 128 then break end
  end
  high = high % 2 ^ 36
  if high >= 2 ^ 35 then high = high - 2 ^ 36 end
  return high * 2 ^ 28 + low, at
end

-- A google.protobuf.Timestamp as seconds and nanoseconds; nil for anything else.
local function instant(text)
  local seconds, nanos, at = 0, 0, 1
  while at <= #text do
    local tag, value = string.byte(text, at)
    if tag ~= 8 and tag ~= 16 then return nil end
    value, at = varint(text, at + 1)
    if not value then return nil end
    if tag == 8 then seconds = value else nanos = value end
  end
  return seconds, nanos
end

-- KEYS[1]: the entity's hash. ARGV: time to live in milliseconds (0: none), number of fields of each view as u16, then
-- fields and values: the private one with the version (seconds i64, nanoseconds i32, sequence i64, and an epoch u32
-- where it is not 0), then each view's timestamp and features.
-- Writes nothing over a newer version, and no view over a newer timestamp that Feast has written there. What an earlier
-- epoch has written is older, whatever its time. Answers with the number of views written.
local function newest(keys, argv)
  local key, ttl, shape, version = keys[1], argv[1], argv[2], argv[4]
  local ask, ends, at = { argv[3] }, {}, 5
  for view = 1, #shape / 2 do
    local low, high = string.byte(shape, 2 * view - 1, 2 * view)
    ask[view + 1] = argv[at]
    at = at + 2 * (low + 256 * high)
    ends[view] = at - 1
  end
  local stored = redis.call('HMGET', key, unpack(ask))
  local seconds, nanos, sequence = struct.unpack('<i8i4i8', version)
  local epoch = #version == 24 and struct.unpack('<I4', version, 21) or 0
  local later = false
  if stored[1] and (#stored[1] == 20 or #stored[1] == 24) then
    local s, n, q = struct.unpack('<i8i4i8', stored[1])
    local e = #stored[1] == 24 and struct.unpack('<I4', stored[1], 21) or 0
    if e > epoch then return 0 end
    later = e < epoch
    if not later and (s > seconds or (s == seconds and (n > nanos or (n == nanos and q > sequence)))) then return 0 end
  end

  local function write(first, last)
    -- Lua's stack holds some 8,000 values.
    for from = first, last, 4000 do
      redis.call('HSET', key, unpack(argv, from, math.min(from + 3999, last)))
    end
  end
  -- The fields to write, in runs that lie together: from the private one on, up to the next view to leave alone.
  local written, first, run, checked, newer = 0, 5, 3, nil, false
  for view = 1, #ends do
    local timestamp = stored[view + 1]
    if not timestamp or later then
      newer, checked = false, nil
    elseif timestamp ~= checked then
      local s, n = instant(timestamp)
      newer = s ~= nil and (s > seconds or (s == seconds and n > nanos))
      checked = timestamp
    end
    if newer then
      if run then write(run, first - 1) end
      run = nil
    else
      run = run or first
      written = written + 1
    end
    first = ends[view] + 1
  end
  if run then write(run, first - 1) end
  if ttl ~= '0' then redis.call('PEXPIRE', key, ttl) end
  return written
end
