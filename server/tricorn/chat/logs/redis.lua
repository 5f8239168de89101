-- What a log asks of Redis: one call is one atomic step. ARGV: what to do, the conversation, the instance, the prefix of
-- the channels; then what the step itself takes. Written for one server and its replicas: keys are not declared.

local conversation, me, channels = ARGV[2], ARGV[3], ARGV[4]
local ROW = 'tricorn:conversation:' .. conversation
local ENTRIES = 'tricorn:entries:' .. conversation
local KEYS_ = 'tricorn:keys:' .. conversation
local ATTENDING = 'tricorn:attending:' .. conversation
local UNANSWERED = 'tricorn:unanswered'
local STORE = 'tricorn:store'

local function text(number) return string.format('%.0f', number) end

local function now()
    local time = redis.call('TIME')
    return tonumber(time[1]) + tonumber(time[2]) / 1e6
end

local function alive(instance) return redis.call('EXISTS', 'tricorn:instance:' .. instance) == 1 end

-- A conversation costs nothing before its first entry: until something is lost, its epoch follows from the store's.
local function first_epoch()
    local store = redis.call('GET', STORE)
    if not store then
        store = redis.sha1hex(me .. table.concat(redis.call('TIME'), '.'))
        redis.call('SET', STORE, store)
    end
    return string.sub(redis.sha1hex(store .. conversation), 1, 16)
end

local function load()
    local row = redis.call('HMGET', ROW, 'epoch', 'first', 'head', 'asked', 'answered', 'token', 'holder', 'cancelled', 'last')
    return {
        epoch = row[1] or first_epoch(),
        first = tonumber(row[2] or 1),
        head = tonumber(row[3] or 0),
        asked = tonumber(row[4] or 0),
        answered = tonumber(row[5] or 0),
        token = row[6] or '0',
        holder = row[7],
        cancelled = row[8] or '',
        last = row[9] or '',
    }
end

local function tell(row)
    redis.call('PUBLISH', channels .. conversation, text(row.head) .. ' ' .. row.cancelled)
end

local function find(seq)
    local found = redis.call('XRANGE', ENTRIES, text(seq), text(seq))
    return found[1] and { text(seq), found[1][2][2] }
end

-- Forget what retention does not ask to keep and no post needs, with the keys. A call takes at most 1000 entries away.
local function forget(row, events, seconds)
    local needed = row.asked > row.answered and row.answered or row.head
    local cut = row.first - 1
    local oldest = now() - seconds
    if redis.call('EXISTS', ENTRIES) == 0 then cut = row.head end  -- its time was over
    for _, entry in ipairs(redis.call('XRANGE', ENTRIES, '-', text(needed), 'COUNT', 1000)) do
        local seq = tonumber(string.match(entry[1], '^%d+'))
        if row.head - seq < events and tonumber(entry[2][4]) > oldest then break end
        if entry[2][6] then redis.call('HDEL', KEYS_, entry[2][6]) end
        cut = seq
    end
    if cut >= row.first then
        row.first = cut + 1
        redis.call('XTRIM', ENTRIES, 'MINID', text(row.first))
        redis.call('HSET', ROW, 'first', text(row.first))
    end
end

local steps = {}

function steps.open(events, seconds)
    local row = load()
    if row.first <= row.head then forget(row, tonumber(events), tonumber(seconds)) end
    return { row.epoch, text(row.first), text(row.head), text(row.answered) }
end

function steps.append(epoch, before, after, key, token, number, is_post, answered, events, seconds)
    local row = load()
    if epoch ~= row.epoch then return 'past' end
    local last = token .. ':' .. number .. ':'
    if token ~= '' then
        if row.holder ~= me or row.token ~= token then return 'lease' end
        if string.sub(row.last, 1, #last) == last then  -- said again: the answer did not arrive
            return { find(tonumber(string.sub(row.last, #last + 1))), 0 }
        end
    end
    if key ~= '' then
        local seq = redis.call('HGET', KEYS_, key)
        if seq then return { find(tonumber(seq)), 1 } end
    end
    row.head = row.head + 1
    local seq = text(row.head)
    local json = before .. seq .. after
    local changes = { 'head', seq }
    redis.call('XADD', ENTRIES, seq .. '-0', 'json', json, 'at', text(now()), unpack(key ~= '' and { 'key', key } or {}))
    if key ~= '' then redis.call('HSET', KEYS_, key, seq) end
    if token ~= '' then
        table.insert(changes, 'last')
        table.insert(changes, last .. seq)
    end
    if is_post == '1' then
        row.asked = row.head
        table.insert(changes, 'asked')
        table.insert(changes, seq)
        redis.call('SADD', UNANSWERED, conversation)
    end
    if answered ~= '' then
        row.answered = tonumber(answered)
        table.insert(changes, 'answered')
        table.insert(changes, answered)
        if row.asked <= row.answered then redis.call('SREM', UNANSWERED, conversation) end
    end
    redis.call('HSET', ROW, unpack(changes))
    if events ~= 'inf' or seconds ~= 'inf' then forget(row, tonumber(events), tonumber(seconds)) end
    if seconds ~= 'inf' then  -- where nobody comes by any more
        for _, key in ipairs({ ENTRIES, KEYS_ }) do
            if row.asked > row.answered then
                redis.call('PERSIST', key)
            else
                redis.call('PEXPIRE', key, text(math.ceil(tonumber(seconds) * 1000)))
            end
        end
    end
    tell(row)
    return { { seq, json }, 0 }
end

function steps.find(key)
    local seq = redis.call('HGET', KEYS_, key)
    return seq and find(tonumber(seq))
end

function steps.claim(seconds)
    local row = load()
    if row.holder and row.holder ~= me and alive(row.holder) then return false end
    redis.call('SET', 'tricorn:instance:' .. me, '', 'PX', seconds)  -- it may have run out while there was no connection
    row.token = text(tonumber(row.token) + 1)
    redis.call('HSET', ROW, 'holder', me, 'token', row.token)
    return row.token
end

function steps.release(token, unanswered)
    local row = load()
    if row.holder ~= me or row.token ~= token then return 1 end
    if row.asked > row.answered and unanswered ~= '1' then return 0 end
    redis.call('HDEL', ROW, 'holder')
    tell(row)
    return 1
end

function steps.cancel(run)
    redis.call('HSET', ROW, 'cancelled', run)
    tell(load())
end

function steps.attend(attending)
    if redis.call(attending == '1' and 'SADD' or 'SREM', ATTENDING, me) == 1 then tell(load()) end
end

function steps.attended()
    for _, instance in ipairs(redis.call('SMEMBERS', ATTENDING)) do
        if instance ~= me and alive(instance) then return 1 end
        if instance ~= me then redis.call('SREM', ATTENDING, instance) end
    end
    return 0
end

function steps.unanswered(limit)
    local found = {}
    for _, key in ipairs(redis.call('SMEMBERS', UNANSWERED)) do
        if #found >= tonumber(limit) then break end
        local holder = redis.call('HGET', 'tricorn:conversation:' .. key, 'holder')
        if not holder or not alive(holder) then table.insert(found, key) end
    end
    return found
end

-- After a connection: where the conversation stands, for who knew of entries up to `known`. If those are not there any
-- more, Redis came back without its last writes: what follows is another past.
function steps.stand(known)
    local row = load()
    if row.head < tonumber(known) then
        redis.call('HSET', ROW, 'epoch', string.sub(redis.sha1hex(row.epoch .. me .. known .. text(row.head)), 1, 16))
    end
    return { text(row.head), row.cancelled }
end

return steps[ARGV[1]](unpack(ARGV, 5))
