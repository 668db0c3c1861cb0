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
  -- Most seconds have five bytes, most nanoseconds four or five: without a loop, those take a fifth of the time.
  local tag, a, b, c, d, e, next_tag, v, w, x, y, z = string.byte(text, 1, 12)
  if tag == 8 and e and a > 127 and b > 127 and c > 127 and d > 127 and e < 128 then
    local seconds = (a - 128) + (b - 128) * 128 + (c - 128) * 16384 + (d - 128) * 2097152 + e * 268435456
    if not next_tag then return seconds, 0 end
    if next_tag == 16 and y and v > 127 and w > 127 and x > 127 then
      local low = (v - 128) + (w - 128) * 128 + (x - 128) * 16384
      if y < 128 and #text == 11 then return seconds, low + y * 2097152 end
      if y > 127 and z and z < 128 and #text == 12 then return seconds, low + (y - 128) * 2097152 + z * 268435456 end
    end
  end
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

-- Writes a row, its fields and values in turn, without the views to leave alone.
local function write_some(key, shape, row, leave)
  local function write(first, last)
    -- Lua's stack holds some 8,000 values.
    for from = first, last, 4000 do
      redis.call('HSET', key, unpack(row, from, math.min(from + 3999, last)))
    end
  end
  -- The fields to write, in runs that lie together: from the private one on, up to the next view to leave alone.
  local first, run = 3, 1
  for view = 1, #shape / 2 do
    local low, high = string.byte(shape, 2 * view - 1, 2 * view)
    if leave[view] then
      if run then write(run, first - 1) end
      run = nil
    else
      run = run or first
    end
    first = first + 2 * (low + 256 * high)
  end
  if run then write(run, first - 1) end
end

-- KEYS: hashes of entities, each once. ARGV: time to live in milliseconds (0: none), number of fields of each view as u16,
-- the name of the private field and of each view's timestamp; then for each key its version (seconds i64, nanoseconds i32,
-- sequence i64, and an epoch u32 where it is not 0), and its fields and values, the private field with the version first,
-- then those of each view, its timestamp first: strings in MessagePack, which the server unpacks faster than arguments, in
-- as many arguments as it takes with 4,000 strings each.
-- Writes nothing over a newer version, and no view over a newer timestamp that Feast has written there. What an earlier
-- epoch has written is older, whatever its time. Answers with the number of rows that were not older.
local function newest(keys, argv)
  local call, strings, parse = redis.call, cmsgpack.unpack, struct.unpack
  local ttl, shape = argv[1], argv[2]
  local views = #shape / 2
  local ask = { unpack(argv, 3, 3 + views) }
  local head = 3 + views
  local parts = (#argv - head) / #keys - 1
  local written = 0
  for row = 1, #keys do
    local key, at = keys[row], head + (row - 1) * (1 + parts) + 1
    local version = argv[at]
    local stored = call('HMGET', key, unpack(ask))
    local old, older, leave = stored[1], true, nil
    local seconds, nanos, sequence = parse('<i8i4i8', version)
    local later = false
    if old and (#old == 20 or #old == 24) then
      local s, n, q = parse('<i8i4i8', old)
      local e = #old == 24 and parse('<I4', old, 21) or 0
      local epoch = #version == 24 and parse('<I4', version, 21) or 0
      later = e < epoch
      older = e < epoch or (e == epoch and (s < seconds or (s == seconds and (n < nanos or (n == nanos and q <= sequence)))))
    end
    if older then
      if not later then
        local checked, newer = nil, false
        for view = 1, views do
          local timestamp = stored[view + 1]
          if timestamp then
            if timestamp ~= checked then
              local s, n = instant(timestamp)
              newer = s ~= nil and (s > seconds or (s == seconds and n > nanos))
              checked = timestamp
            end
            if newer then
              leave = leave or {}
              leave[view] = true
            end
          end
        end
      end
      if leave then
        local all = {}
        for part = at + 1, at + parts do
          for _, text in ipairs({ strings(argv[part]) }) do all[#all + 1] = text end
        end
        write_some(key, shape, all, leave)
      else
        for part = at + 1, at + parts do call('HSET', key, strings(argv[part])) end
      end
      if ttl ~= '0' then call('PEXPIRE', key, ttl) end
      written = written + 1
    end
  end
  return written
end
