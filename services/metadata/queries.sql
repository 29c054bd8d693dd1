-- Every statement of this room, by name. `{documents}` and `{vectors}` are one collection's tables.

-- take_service_lock: be the one service of this database, for as long as the connection lives
SELECT pg_try_advisory_lock(%(key)s);

-- server_facts: what start-up checks before it touches anything
SELECT current_setting('server_version_num')::integer, current_setting('server_encoding'),
       to_regclass('ringfort.migrations') IS NOT NULL;

-- applied_migrations: which migrations this database has
SELECT coalesce(max(number), 0) FROM migrations;

-- record_migration: remember that a migration was applied
INSERT INTO migrations (number, name) VALUES (%(number)s, %(name)s);

-- identity: which server, timeline and database this is
SELECT concat_ws('/', system_identifier, left(pg_walfile_name(pg_current_wal_lsn()), 8), oid)
FROM pg_control_system(), pg_database WHERE datname = current_database();

-- confirm_log: the log's id and term, new ones if it was made on another server, timeline or database
UPDATE logs
SET log_id = CASE WHEN identity IN ('', %(identity)s) THEN log_id ELSE gen_random_uuid() END,
    term = CASE WHEN identity IN ('', %(identity)s) THEN term ELSE term + 1 END,
    identity = %(identity)s
RETURNING log_id::text, term;

-- service: whose database this is, and which of its partitions; no partition where it is a home, or new
SELECT service, partition FROM logs;

-- become_partition: belong to a service under a name, unless this is a home or another partition
UPDATE logs SET service = %(service)s, partition = %(name)s
WHERE (partition IS NULL AND NOT EXISTS (SELECT FROM collections))
   OR (partition = %(name)s AND service = %(service)s)
RETURNING partition;

-- await_writers: return when every write under way is done
SELECT FROM counters ORDER BY collection_uid FOR UPDATE;

-- claim_counters: from now on only writes with this claim are written
UPDATE counters SET claim = %(claim)s;

-- ping: the server answers
SELECT 1;

-- lock_registry: one change of names at a time; reading goes on
LOCK TABLE collections IN SHARE ROW EXCLUSIVE MODE;

-- reserve_uid: the number of a collection that is about to be made
SELECT nextval(pg_get_serial_sequence('collections', 'uid')),
       (extract(epoch FROM clock_timestamp()) * 1000000)::bigint;

-- create_collection: a collection, unless its name is an alias
INSERT INTO collections (uid, tenant, name, dim, metric, schema, model, slots, shards, replicas, index,
                         max_staleness_ms, space, databases, created_at_us)
OVERRIDING SYSTEM VALUE
SELECT %(uid)s, %(tenant)s, %(name)s, %(dim)s, %(metric)s, %(schema)s, %(model)s, %(slots)s, %(shards)s,
       %(replicas)s, %(index)s, %(max_staleness_ms)s, %(space)s, %(databases)s, %(created_at_us)s
WHERE NOT EXISTS (SELECT FROM aliases WHERE tenant = %(tenant)s AND alias = %(name)s)
ON CONFLICT (tenant, name) DO NOTHING
RETURNING generation, schema_version;

-- create_counter: an empty log, and the table of vectors that its writes fill
INSERT INTO counters (collection_uid, claim) VALUES (%(uid)s, %(claim)s);

-- add_embedded: a generation has a table of vectors here
INSERT INTO embedded (collection_uid, generation) VALUES (%(uid)s, %(generation)s) ON CONFLICT DO NOTHING;

-- create_tables: documents by slot and id
CREATE TABLE {documents} (
    slot       integer NOT NULL,
    id         text COLLATE "C" NOT NULL,
    seq        bigint NOT NULL,
    term       integer NOT NULL DEFAULT 1,
    deleted    boolean NOT NULL,
    text       text,
    attributes jsonb NOT NULL,
    PRIMARY KEY (slot, id)
) PARTITION BY HASH (slot);
CREATE INDEX {documents}_seq ON {documents} (seq);
CREATE INDEX {documents}_dead ON {documents} (seq) WHERE deleted;

-- create_vectors: one generation's vectors
CREATE TABLE IF NOT EXISTS {vectors} (
    slot    integer NOT NULL,
    id      text COLLATE "C" NOT NULL,
    doc_seq bigint NOT NULL,
    vector  bytea STORAGE EXTERNAL NOT NULL,
    PRIMARY KEY (slot, id)
) WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05,
        toast.autovacuum_vacuum_scale_factor = 0.05);

-- create_partition: one hash partition of a documents table
CREATE TABLE {documents}_{part} PARTITION OF {documents} FOR VALUES WITH (MODULUS {parts}, REMAINDER {part})
WITH (autovacuum_vacuum_scale_factor = 0.05, autovacuum_analyze_scale_factor = 0.05);

-- collections: all collections of all tenants, with their aliases
SELECT uid, tenant, name, dim, metric, schema, schema_version, model, slots, shards, replicas, index,
       max_staleness_ms, generation, space, created_at_us, databases,
       ARRAY(SELECT alias FROM aliases WHERE collection_uid = uid ORDER BY alias) AS aliases
FROM collections ORDER BY uid;

-- find_collection: a collection's number by name
SELECT uid FROM collections WHERE tenant = %(tenant)s AND name = %(name)s;

-- drop_registration: forget a collection; its counter and aliases go with it
DELETE FROM collections WHERE uid = %(uid)s RETURNING created_at_us, databases;

-- registration: when the collection of that number was made
SELECT created_at_us FROM collections WHERE uid = %(uid)s;

-- generations: all that a collection has had, and what they were made with
SELECT number, state, model, dim, space, index FROM generations
WHERE collection_uid = %(uid)s ORDER BY number;

-- generations_beside: those that are not live, of all collections
SELECT collection_uid, number, state, model, dim, space, index FROM generations
WHERE state IN ('building', 'ready', 'previous') ORDER BY collection_uid, number;

-- add_generation: one more than there were, unless there is one beside the live one
INSERT INTO generations (collection_uid, number, state, model, dim, space, index)
SELECT %(uid)s, 1 + max(number), 'building', %(model)s, %(dim)s, %(space)s, %(index)s
FROM generations WHERE collection_uid = %(uid)s
HAVING bool_and(state IN ('live', 'dropped'))
RETURNING number;

-- add_first_generation: what a collection begins with
INSERT INTO generations (collection_uid, number, state, model, dim, space, index)
VALUES (%(uid)s, %(generation)s, 'live', %(model)s, %(dim)s, %(space)s, %(index)s);

-- set_generation_state: what has become of a generation that is not the live one
UPDATE generations SET state = %(state)s
WHERE collection_uid = %(uid)s AND number = %(generation)s AND state IN ('building', 'ready', 'previous');

-- replace_live: the live generation is so no more
UPDATE generations SET state = %(state)s WHERE collection_uid = %(uid)s AND state = 'live';

-- make_live: another one is
UPDATE generations SET state = 'live' WHERE collection_uid = %(uid)s AND number = %(generation)s;

-- set_live: a collection is what its live generation is
UPDATE collections c SET generation = g.number, model = g.model, dim = g.dim, space = g.space, index = g.index
FROM generations g WHERE c.uid = %(uid)s AND g.collection_uid = c.uid AND g.state = 'live';

-- close_writes: nothing more is written; the generation that was has all vectors up to where the log stands
WITH closed AS (
    UPDATE counters SET generation = 0
    WHERE collection_uid = %(uid)s AND claim = %(claim)s AND generation IN (0, %(generation)s) RETURNING seq
)
UPDATE embedded SET upto = greatest(upto, closed.seq) FROM closed
WHERE collection_uid = %(uid)s AND generation = %(generation)s RETURNING closed.seq;

-- open_writes: writes bring vectors of this generation
UPDATE counters SET generation = %(generation)s
WHERE collection_uid = %(uid)s AND claim = %(claim)s RETURNING generation;

-- textless: documents that have no text to make another vector of
SELECT count(*) FROM {documents} WHERE NOT deleted AND coalesce(text, '') = '';

-- to_embed: documents of which a generation has no vectors yet, in order, and where the log stands
SELECT t.seq, t.begin, t.place, t.slot, t.id, t.deleted, t.text,
       CASE WHEN %(with_vectors)s THEN (
           SELECT v.vector FROM {vectors} v WHERE v.slot = t.slot AND v.id = t.id AND v.doc_seq = t.place
       ) END
FROM (
    SELECT c.seq, greatest(e.upto, %(after)s) AS begin, d.*
    FROM counters c JOIN embedded e USING (collection_uid)
    LEFT JOIN LATERAL (
        SELECT seq AS place, slot, id, deleted, text FROM {documents}
        WHERE seq > greatest(e.upto, %(after)s) ORDER BY seq LIMIT %(limit)s
    ) d ON true
    WHERE c.collection_uid = %(uid)s AND e.generation = %(generation)s
      AND (SELECT log_id FROM logs) = %(log_id)s
    ORDER BY d.place
) t
ORDER BY t.place;

-- put_vectors: vectors of documents as of their positions, unless there is a later one, and up to where that is all
WITH batch AS (
    SELECT slot, id, seq,
           substring(%(matrix)b::bytea FROM ((row - 1) * %(row_bytes)s + 1)::integer FOR %(row_bytes)s) AS vector
    FROM unnest(%(slots)b::int4[], %(ids)b::text[], %(seqs)b::int8[]) WITH ORDINALITY AS rows (slot, id, seq, row)
), put AS (
    INSERT INTO {vectors} AS v (slot, id, doc_seq, vector) SELECT slot, id, seq, vector FROM batch
    ON CONFLICT (slot, id) DO UPDATE SET doc_seq = excluded.doc_seq, vector = excluded.vector
    WHERE v.doc_seq < excluded.doc_seq
), removed AS (
    DELETE FROM {vectors} v
    USING unnest(%(gone_slots)b::int4[], %(gone_ids)b::text[], %(gone_seqs)b::int8[]) AS gone (slot, id, seq)
    WHERE v.slot = gone.slot AND v.id = gone.id AND v.doc_seq < gone.seq
)
UPDATE embedded SET upto = %(upto)s
WHERE collection_uid = %(uid)s AND generation = %(generation)s AND upto = %(after)s
  AND EXISTS (SELECT FROM counters c WHERE c.collection_uid = %(uid)s AND c.claim = %(claim)s)
RETURNING upto;

-- leave_over: partitions may have tables of a collection that is not there
INSERT INTO leftovers (collection_uid, created_at_us, database)
SELECT %(uid)s, %(created_at_us)s, unnest(%(partitions)s::text[]);

-- not_left_over: those tables belong to a collection that is there
DELETE FROM leftovers WHERE collection_uid = %(uid)s;

-- leftovers: what was left over some time ago
SELECT collection_uid, created_at_us, database FROM leftovers
WHERE since <= clock_timestamp() - make_interval(secs => %(age_s)s) ORDER BY since LIMIT 1000;

-- take_leftover: be the one who removes it; nobody makes it a collection meanwhile
SELECT FROM leftovers WHERE collection_uid = %(uid)s AND database = %(database)s FOR UPDATE SKIP LOCKED;

-- drop_leftover: it is removed
DELETE FROM leftovers WHERE collection_uid = %(uid)s AND database = %(database)s;

-- drop_recent_writes: forget a collection's recent transactions
DELETE FROM recent_writes WHERE collection_uid = %(uid)s;

-- drop_tables: a collection's documents
DROP TABLE {documents};

-- drop_vectors_table: a generation's vectors
DROP TABLE IF EXISTS {vectors};

-- tables_of_vectors: the generations that have one here
SELECT generation FROM embedded WHERE collection_uid = %(uid)s ORDER BY generation;

-- drop_embedded: a generation has none any more
DELETE FROM embedded WHERE collection_uid = %(uid)s AND generation = %(generation)s;

-- set_alias: point an alias at a collection
INSERT INTO aliases (tenant, alias, collection_uid) VALUES (%(tenant)s, %(alias)s, %(uid)s)
ON CONFLICT (tenant, alias) DO UPDATE SET collection_uid = excluded.collection_uid;

-- drop_alias: remove an alias
DELETE FROM aliases WHERE tenant = %(tenant)s AND alias = %(alias)s;

-- models: every version of every model
SELECT name, version, kind, state, traffic_percent, artifact, manifest, registered_at_us
FROM models ORDER BY name, version;

-- lock_models: be the only one who registers
LOCK TABLE models IN SHARE ROW EXCLUSIVE MODE;

-- model_kind: what the versions of a name do
SELECT kind FROM models WHERE name = %(name)s LIMIT 1;

-- register_model: a version that nobody uses yet, unless it is there
INSERT INTO models (name, version, kind, artifact, manifest)
VALUES (%(name)s, %(version)s, %(kind)s, %(artifact)s, %(manifest)s)
ON CONFLICT (name, version) DO NOTHING
RETURNING registered_at_us;

-- lock_model: be the only one who changes which version of a name is live
SELECT version, state, promotion FROM models WHERE name = %(name)s ORDER BY version FOR UPDATE;

-- retire_model: what is live is so no more
UPDATE models SET state = 'retired' WHERE name = %(name)s AND state = 'live';

-- withdraw_model: what is live is so no more, and its turn never was
UPDATE models SET state = 'retired', promotion = NULL WHERE name = %(name)s AND state = 'live';

-- promote_model: a version becomes live, after all that were before
UPDATE models SET state = 'live', promotion = nextval('model_promotions')
WHERE name = %(name)s AND version = %(version)s;

-- begin_canary: a version that is not live gets a share of the traffic
UPDATE models SET state = 'canary', traffic_percent = %(percent)s
WHERE name = %(name)s AND version = %(version)s;

-- end_canary: the canary of a name, if there is one, is again what it was before
UPDATE models SET state = CASE WHEN promotion IS NULL THEN 'staged' ELSE 'retired' END, traffic_percent = 0
WHERE name = %(name)s AND state = 'canary';

-- restore_model: a version becomes live again, in its old turn
UPDATE models SET state = 'live' WHERE name = %(name)s AND version = %(version)s;

-- shard_map: a collection's epoch and who owns its slots; nulls where the first map is the only one there was
SELECT c.epoch, m.phase, m.owners, m.next
FROM counters c LEFT JOIN shard_maps m USING (collection_uid) WHERE c.collection_uid = %(uid)s;

-- advance_epoch: go from one epoch to the next, if the claim is still held; writes wait until it is done
UPDATE counters SET epoch = %(epoch)s
WHERE collection_uid = %(uid)s AND claim = %(claim)s AND epoch = %(epoch)s - 1 RETURNING epoch;

-- follow_epoch: a partition's commits tell the epoch, too
UPDATE counters SET epoch = greatest(epoch, %(epoch)s)
WHERE collection_uid = %(uid)s AND claim = %(claim)s RETURNING epoch;

-- put_shard_map: who owns a collection's slots from this epoch on
INSERT INTO shard_maps (collection_uid, phase, owners, next)
VALUES (%(uid)s, %(phase)s, %(owners)s, %(next)s)
ON CONFLICT (collection_uid) DO UPDATE
SET phase = excluded.phase, owners = excluded.owners, next = excluded.next;

-- set_replicas: how many copies each shard of a collection is to have
UPDATE collections SET replicas = %(replicas)s WHERE uid = %(uid)s;

-- begin_job: a job that runs
INSERT INTO jobs (id, collection_uid, kind, state, argument)
VALUES (%(id)s, %(uid)s, %(kind)s, 'running', %(argument)s)
RETURNING id, collection_uid, kind, state, argument, message, started_at_us, ended_at_us, figures;

-- end_job: a job has come to its end
UPDATE jobs SET state = %(state)s, message = %(message)s, figures = %(figures)s,
                ended_at_us = (extract(epoch FROM clock_timestamp()) * 1000000)::bigint
WHERE id = %(id)s AND state = 'running'
RETURNING id, collection_uid, kind, state, argument, message, started_at_us, ended_at_us, figures;

-- jobs: the latest jobs of some collections
SELECT id, collection_uid, kind, state, argument, message, started_at_us, ended_at_us, figures
FROM jobs WHERE collection_uid = ANY (%(uids)s) ORDER BY started_at_us DESC LIMIT 256;

-- running_jobs: the jobs that have not ended
SELECT id, collection_uid, kind, state, argument, message, started_at_us, ended_at_us, figures
FROM jobs WHERE state = 'running' ORDER BY started_at_us;

-- position: where a log stands
SELECT seq FROM counters WHERE collection_uid = %(uid)s;

-- reached: the same, as far as a generation has the vectors of all documents
SELECT CASE WHEN c.generation = %(generation)s THEN c.seq ELSE coalesce(e.upto, 0) END
FROM counters c LEFT JOIN embedded e ON e.collection_uid = c.collection_uid AND e.generation = %(generation)s
WHERE c.collection_uid = %(uid)s;

-- written_by: whether the claim is still held, and which generation writes bring vectors of
SELECT claim = %(claim)s, generation FROM counters WHERE collection_uid = %(uid)s;

-- lock_tables: come before whoever drops them; a writer always has its tables before its counter
LOCK TABLE ONLY {documents} IN ROW EXCLUSIVE MODE;

-- lock_counter: be the only writer of a log until the transaction ends; whether the claim is still held
SELECT seq, claim = %(claim)s, generation FROM counters WHERE collection_uid = %(uid)s FOR UPDATE;

-- current: what a batch's conditional writes are checked against; text and attributes only where they stay
SELECT d.slot, d.id, d.term, d.seq, d.deleted,
       CASE WHEN wanted.whole THEN d.text END,
       CASE WHEN wanted.whole THEN d.attributes ELSE '{{}}' END
FROM unnest(%(slots)b::int4[], %(ids)b::text[], %(whole)b::bool[]) AS wanted (slot, id, whole)
JOIN {documents} d ON d.slot = wanted.slot AND d.id = wanted.id;

-- write_rows: take positions and write the batch, in one statement and so in one round trip
WITH counter AS (
    UPDATE counters SET seq = seq + %(positions)s, writes = writes + 1
    WHERE collection_uid = %(uid)s AND claim = %(claim)s AND generation = %(generation)s
    RETURNING seq - %(positions)s AS after, writes, epoch
), remembered AS (
    INSERT INTO recent_writes (collection_uid, place, write_id, after)
    SELECT %(uid)s, writes %% %(remembered)s, %(write_id)s, after FROM counter
    ON CONFLICT (collection_uid, place) DO UPDATE SET write_id = excluded.write_id, after = excluded.after
), batch AS (
    SELECT slot, id, after + ordinal AS seq, deleted, has_vector, text, attributes, row
    FROM counter, unnest(%(slots)b::int4[], %(ids)b::text[], %(ordinals)b::int4[], %(deleted)b::bool[],
                         %(has_vector)b::bool[], %(texts)b::text[], %(attributes)b::text[])
         WITH ORDINALITY AS rows (slot, id, ordinal, deleted, has_vector, text, attributes, row)
), written AS (
    INSERT INTO {documents} (slot, id, seq, term, deleted, text, attributes)
    SELECT slot, id, seq, %(term)s, deleted, text, attributes::jsonb FROM batch
    ON CONFLICT (slot, id) DO UPDATE
    SET seq = excluded.seq, term = excluded.term, deleted = excluded.deleted, text = excluded.text,
        attributes = excluded.attributes
), embedded AS (
    -- one matrix is cut here: an array of bytea would be copied once more on either side
    INSERT INTO {vectors} (slot, id, doc_seq, vector)
    SELECT slot, id, seq,
           substring(%(matrix)b::bytea FROM ((row - 1) * %(row_bytes)s + 1)::integer FOR %(row_bytes)s)
    FROM batch WHERE has_vector
    ON CONFLICT (slot, id) DO UPDATE SET doc_seq = excluded.doc_seq, vector = excluded.vector
)
SELECT after, writes, epoch FROM counter;

-- drop_vectors: a tombstone has no vector
DELETE FROM {vectors} v USING unnest(%(slots)b::int4[], %(ids)b::text[]) AS gone (slot, id)
WHERE v.slot = gone.slot AND v.id = gone.id;

-- move_vectors: a patched document's vector follows it to its new position
UPDATE {vectors} v SET doc_seq = moved.seq
FROM unnest(%(slots)b::int4[], %(ids)b::text[], %(seqs)b::int8[]) AS moved (slot, id, seq)
WHERE v.slot = moved.slot AND v.id = moved.id
RETURNING v.id, v.vector;

-- remembered: how many transactions a log has had, and from where this one started if it was committed
SELECT c.writes, r.after FROM counters c LEFT JOIN recent_writes r ON r.write_id = %(write_id)s
WHERE c.collection_uid = %(uid)s;

-- get: documents by id, at their place in the question
SELECT wanted.place, d.slot, d.id, d.term, d.seq, d.deleted, d.text, d.attributes,
       CASE WHEN %(with_vectors)s THEN (
           SELECT v.vector FROM {vectors} v WHERE v.slot = d.slot AND v.id = d.id AND v.doc_seq = d.seq
       ) END
FROM unnest(%(slots)b::int4[], %(ids)b::text[]) WITH ORDINALITY AS wanted (slot, id, place)
JOIN {documents} d ON d.slot = wanted.slot AND d.id = wanted.id AND NOT d.deleted;

-- scan: live documents in order of slot and id
SELECT d.slot, d.id, d.term, d.seq, d.deleted, d.text, d.attributes,
       CASE WHEN %(with_vectors)s THEN (
           SELECT v.vector FROM {vectors} v WHERE v.slot = d.slot AND v.id = d.id AND v.doc_seq = d.seq
       ) END
FROM (
    SELECT slot, id, term, seq, deleted, text, attributes FROM {documents}
    WHERE (slot, id) > (%(slot)s, %(id)s) AND NOT deleted
    ORDER BY slot, id LIMIT %(limit)s
) d
ORDER BY d.slot, d.id;

-- tail: the position, the purge floor and the rows (of some slots) beyond a position; one statement, one snapshot
SELECT t.counter, t.purge_floor, t.slot, t.id, t.term, t.seq, t.deleted, t.text, t.attributes, (
           SELECT v.vector FROM {vectors} v WHERE v.slot = t.slot AND v.id = t.id AND v.doc_seq = t.seq
       )
FROM (
    -- sorted in here, so that vectors are not carried through the sort
    SELECT c.counter, c.purge_floor, d.* FROM (
        SELECT CASE WHEN k.generation = %(generation)s THEN k.seq ELSE coalesce(e.upto, 0) END AS counter,
               k.purge_floor
        FROM counters k
        LEFT JOIN embedded e ON e.collection_uid = k.collection_uid AND e.generation = %(generation)s
        WHERE k.collection_uid = %(uid)s AND (SELECT log_id FROM logs) = %(log_id)s
    ) c LEFT JOIN LATERAL (
        SELECT slot, id, term, seq, deleted, text, attributes FROM {documents}
        WHERE seq > %(after)s AND seq <= c.counter
          AND (%(slots)s::int4[] IS NULL OR slot = ANY (%(slots)s::int4[]))
        ORDER BY seq LIMIT %(limit)s
    ) d ON true
    ORDER BY d.seq
) t
ORDER BY t.seq;

-- mark_positions: note where every log stands now, if it has moved since it was noted last
INSERT INTO marks (collection_uid, seq)
-- locked, so that a collection dropped meanwhile is left out rather than found missing by the foreign key
SELECT collection_uid, seq FROM counters WHERE seq > 0 ORDER BY collection_uid FOR KEY SHARE
ON CONFLICT DO NOTHING;

-- old_positions: up to where each log was written longer ago than that
SELECT collection_uid, max(seq) FROM marks
WHERE at < clock_timestamp() - make_interval(secs => %(age_s)s) GROUP BY collection_uid;

-- purge: drop the oldest tombstones at or below a position, and say up to where the log has forgotten
WITH old AS (
    SELECT slot, id FROM {documents} WHERE deleted AND seq <= %(upto)s ORDER BY seq LIMIT %(limit)s
), gone AS (
    DELETE FROM {documents} d USING old WHERE d.slot = old.slot AND d.id = old.id RETURNING d.seq
), floor AS (
    UPDATE counters SET purge_floor = greatest(purge_floor, (SELECT max(seq) FROM gone))
    WHERE collection_uid = %(uid)s AND EXISTS (SELECT FROM gone)
)
SELECT count(*) FROM gone;

-- drop_marks: forget marks whose tombstones are purged
DELETE FROM marks WHERE collection_uid = %(uid)s AND seq <= %(upto)s;
