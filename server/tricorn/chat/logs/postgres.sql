-- Version 1 of what a log keeps in PostgreSQL, and what it asks: each function is one atomic step.

CREATE SCHEMA IF NOT EXISTS tricorn;
CREATE TABLE tricorn.version (number int NOT NULL);
INSERT INTO tricorn.version VALUES (1);

CREATE TABLE tricorn.store (id text NOT NULL);
INSERT INTO tricorn.store VALUES (md5(random()::text || clock_timestamp()::text));

CREATE TABLE tricorn.instance (id text PRIMARY KEY, alive_until timestamptz NOT NULL);

CREATE TABLE tricorn.conversation (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    key text COLLATE "C" NOT NULL UNIQUE,
    epoch text NOT NULL,
    first bigint NOT NULL DEFAULT 1,
    head bigint NOT NULL DEFAULT 0,
    asked bigint NOT NULL DEFAULT 0,
    answered bigint NOT NULL DEFAULT 0,
    token bigint NOT NULL DEFAULT 0,
    holder text,
    cancelled text NOT NULL DEFAULT '',
    last text NOT NULL DEFAULT ''
) WITH (fillfactor = 70);
CREATE INDEX conversation_unanswered ON tricorn.conversation (id) WHERE asked > answered;

CREATE TABLE tricorn.entry (
    conversation bigint NOT NULL,
    seq bigint NOT NULL,
    json bytea NOT NULL,
    key text COLLATE "C",
    at timestamptz NOT NULL,
    PRIMARY KEY (conversation, seq)
);
CREATE UNIQUE INDEX entry_key ON tricorn.entry (conversation, key) WHERE key IS NOT NULL;
CREATE INDEX entry_at ON tricorn.entry USING brin (at);

CREATE TABLE tricorn.attending (
    conversation text COLLATE "C" NOT NULL,
    instance text NOT NULL REFERENCES tricorn.instance ON DELETE CASCADE,
    PRIMARY KEY (conversation, instance)
);
CREATE INDEX attending_instance ON tricorn.attending (instance);

-- A conversation costs nothing before its first entry: until something is lost, its epoch follows from the store's.
CREATE FUNCTION tricorn.first_epoch(k text) RETURNS text LANGUAGE sql STABLE AS
    $$ SELECT left(md5(id || k), 16) FROM tricorn.store $$;

CREATE FUNCTION tricorn.alive(i text) RETURNS boolean LANGUAGE sql VOLATILE AS
    $$ SELECT EXISTS (SELECT FROM tricorn.instance WHERE id = i AND alive_until > clock_timestamp()) $$;

CREATE FUNCTION tricorn.renew(me text, seconds float8) RETURNS void LANGUAGE sql AS $$
    INSERT INTO tricorn.instance VALUES (me, clock_timestamp() + seconds * interval '1 second')
    ON CONFLICT (id) DO UPDATE SET alive_until = excluded.alive_until
$$;

-- An empty payload: look after everything.
CREATE FUNCTION tricorn.tell(k text, head bigint, cancelled text) RETURNS void LANGUAGE sql AS $$
    SELECT pg_notify('tricorn', CASE WHEN octet_length(k) < 7000 THEN head || E'\n' || cancelled || E'\n' || k ELSE '' END)
$$;

-- The row of a conversation, locked; made where there is none.
CREATE FUNCTION tricorn.row(k text) RETURNS tricorn.conversation LANGUAGE plpgsql AS $$
DECLARE c tricorn.conversation;
BEGIN
    SELECT * INTO c FROM tricorn.conversation WHERE key = k FOR UPDATE;
    IF NOT FOUND THEN
        INSERT INTO tricorn.conversation (key, epoch) VALUES (k, tricorn.first_epoch(k)) ON CONFLICT DO NOTHING;
        SELECT * INTO c FROM tricorn.conversation WHERE key = k FOR UPDATE;
    END IF;
    RETURN c;
END $$;

-- Forget what retention does not ask to keep and no post needs.
CREATE FUNCTION tricorn.forget(c tricorn.conversation, events float8, seconds float8) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE
    needed bigint := CASE WHEN c.asked > c.answered THEN c.answered ELSE c.head END;
    cut bigint := c.first - 1;
BEGIN
    IF events < 'infinity' THEN
        cut := greatest(cut, least(needed, c.head - floor(events)::bigint));
    END IF;
    IF seconds < 'infinity' THEN
        cut := greatest(cut, (SELECT max(seq) FROM tricorn.entry WHERE conversation = c.id AND seq <= needed
                                AND at < clock_timestamp() - seconds * interval '1 second'));
    END IF;
    IF cut >= c.first THEN
        DELETE FROM tricorn.entry WHERE conversation = c.id AND seq <= cut;
        UPDATE tricorn.conversation SET first = cut + 1 WHERE id = c.id;
    END IF;
    RETURN cut + 1;
END $$;

CREATE FUNCTION tricorn.open(k text, events float8, seconds float8)
    RETURNS TABLE (epoch text, first bigint, head bigint, answered bigint) LANGUAGE plpgsql AS $$
DECLARE c tricorn.conversation;
BEGIN
    SELECT * INTO c FROM tricorn.conversation WHERE key = k;
    IF NOT FOUND THEN
        RETURN QUERY SELECT tricorn.first_epoch(k), 1::bigint, 0::bigint, 0::bigint;
        RETURN;
    END IF;
    IF c.first <= c.head AND (events < 'infinity' OR seconds < 'infinity') THEN
        SELECT * INTO c FROM tricorn.conversation WHERE key = k FOR UPDATE;
        c.first := tricorn.forget(c, events, seconds);
    END IF;
    RETURN QUERY SELECT c.epoch, c.first, c.head, c.answered;
END $$;

-- Appends of one instance, those of a conversation next to each other, and all in the order of the conversations: so no
-- two instances wait for each other. The outcome is 'new', 'repeated', 'past' or 'lease'.
CREATE FUNCTION tricorn.append(
    me text, keys text[], epochs text[], befores bytea[], behinds bytea[], event_keys text[], tokens bigint[],
    numbers bigint[], posts boolean[], answers bigint[], events float8, seconds float8
) RETURNS TABLE (outcome text, place bigint, content bytea) LANGUAGE plpgsql AS $$
DECLARE
    c tricorn.conversation;
    n int;
    said text;
    changed boolean := false;
BEGIN
    FOR n IN 1 .. cardinality(keys) LOOP
        IF c.key IS DISTINCT FROM keys[n] THEN
            c := tricorn.row(keys[n]);
        END IF;
        said := tokens[n] || ':' || numbers[n] || ':';
        place := NULL;
        content := NULL;
        IF c.epoch <> epochs[n] THEN
            outcome := 'past';
        ELSIF tokens[n] IS NOT NULL AND (c.holder IS DISTINCT FROM me OR c.token <> tokens[n]) THEN
            outcome := 'lease';
        ELSIF tokens[n] IS NOT NULL AND starts_with(c.last, said) THEN  -- said again: the answer did not arrive
            outcome := 'new';
            place := substr(c.last, length(said) + 1)::bigint;
        ELSE
            IF event_keys[n] IS NOT NULL THEN
                SELECT e.seq INTO place FROM tricorn.entry e WHERE e.conversation = c.id AND e.key = event_keys[n];
            END IF;
            IF place IS NOT NULL THEN
                outcome := 'repeated';
            ELSE
                outcome := 'new';
                c.head := c.head + 1;
                place := c.head;
                content := befores[n] || c.head::text::bytea || behinds[n];
                INSERT INTO tricorn.entry VALUES (c.id, c.head, content, event_keys[n], clock_timestamp());
                IF posts[n] THEN c.asked := c.head; END IF;
                c.answered := coalesce(answers[n], c.answered);
                c.last := coalesce(said || place, c.last);
                UPDATE tricorn.conversation t
                    SET head = c.head, asked = c.asked, answered = c.answered, last = c.last WHERE t.id = c.id;
                IF events < 'infinity' OR seconds < 'infinity' THEN
                    c.first := tricorn.forget(c, events, seconds);
                END IF;
                changed := true;
            END IF;
        END IF;
        IF changed AND (n = cardinality(keys) OR keys[n + 1] <> keys[n]) THEN
            PERFORM tricorn.tell(c.key, c.head, c.cancelled);
            changed := false;
        END IF;
        IF content IS NULL AND place IS NOT NULL THEN
            SELECT e.json INTO content FROM tricorn.entry e WHERE e.conversation = c.id AND e.seq = place;
        END IF;
        RETURN NEXT;
    END LOOP;
END $$;

CREATE FUNCTION tricorn.claim(k text, me text, seconds float8) RETURNS bigint LANGUAGE plpgsql AS $$
DECLARE c tricorn.conversation := tricorn.row(k);
BEGIN
    IF c.holder <> me AND tricorn.alive(c.holder) THEN
        RETURN NULL;
    END IF;
    PERFORM tricorn.renew(me, seconds);  -- it may have run out while there was no connection
    UPDATE tricorn.conversation SET holder = me, token = c.token + 1 WHERE id = c.id;
    RETURN c.token + 1;
END $$;

CREATE FUNCTION tricorn.release(k text, me text, t bigint, unanswered boolean) RETURNS boolean LANGUAGE plpgsql AS $$
DECLARE c tricorn.conversation := tricorn.row(k);
BEGIN
    IF c.holder IS DISTINCT FROM me OR c.token <> t THEN
        RETURN true;
    END IF;
    IF c.asked > c.answered AND NOT unanswered THEN
        RETURN false;
    END IF;
    UPDATE tricorn.conversation SET holder = NULL WHERE id = c.id;
    PERFORM tricorn.tell(k, c.head, c.cancelled);
    RETURN true;
END $$;

CREATE FUNCTION tricorn.cancel(k text, run text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE c tricorn.conversation := tricorn.row(k);
BEGIN
    UPDATE tricorn.conversation SET cancelled = run WHERE id = c.id;
    PERFORM tricorn.tell(k, c.head, run);
END $$;

CREATE FUNCTION tricorn.attend(k text, me text, attends boolean, seconds float8) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    IF attends THEN
        PERFORM tricorn.renew(me, seconds);
        INSERT INTO tricorn.attending VALUES (k, me) ON CONFLICT DO NOTHING;
    ELSE
        DELETE FROM tricorn.attending WHERE conversation = k AND instance = me;
    END IF;
    IF FOUND THEN
        PERFORM tricorn.tell(k, coalesce((SELECT head FROM tricorn.conversation WHERE key = k), 0),
                             coalesce((SELECT cancelled FROM tricorn.conversation WHERE key = k), ''));
    END IF;
END $$;

-- After a connection: where conversations stand, for who knew of entries up to `known`. If those are not there any more,
-- the server came back without its last writes: what follows is another past.
CREATE FUNCTION tricorn.stand(keys text[], known bigint[]) RETURNS TABLE (key text, head bigint, cancelled text)
    LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN
    UPDATE tricorn.conversation c SET epoch = left(md5(c.epoch || k.n || c.head), 16)
        FROM unnest(keys, known) AS k (key, n) WHERE c.key = k.key AND c.head < k.n;
    RETURN QUERY SELECT c.key, c.head, c.cancelled FROM tricorn.conversation c WHERE c.key = ANY (keys);
END $$;

-- Forget by age where nobody comes by, and instances that are long gone.
CREATE FUNCTION tricorn.sweep(seconds float8) RETURNS void LANGUAGE plpgsql AS $$
DECLARE c tricorn.conversation;
BEGIN
    IF NOT pg_try_advisory_xact_lock(7428, 2) THEN
        RETURN;
    END IF;
    DELETE FROM tricorn.instance WHERE alive_until < clock_timestamp() - interval '1 day';
    IF seconds < 'infinity' THEN
        FOR c IN SELECT t.* FROM tricorn.conversation t WHERE t.id IN (
                SELECT DISTINCT e.conversation FROM tricorn.entry e
                WHERE e.at < clock_timestamp() - seconds * interval '1 second' LIMIT 1000)
            ORDER BY t.key FOR UPDATE
        LOOP
            PERFORM tricorn.forget(c, 'infinity', seconds);
        END LOOP;
    END IF;
END $$;
