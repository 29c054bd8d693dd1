-- Who owns which slot of a collection. A collection without a row has its first map, which its numbers of slots
-- and shards make. `next` are the owners it is on the way to, while there are any.
CREATE TABLE shard_maps (
    collection_uid bigint PRIMARY KEY REFERENCES collections ON DELETE CASCADE,
    phase          text NOT NULL CHECK (phase IN ('steady', 'migrating', 'retiring')),
    owners         integer[] NOT NULL,
    next           integer[],
    CHECK ((phase = 'steady') = (next IS NULL))
);

-- The epoch stands in the row that every write updates: a commit tells it, so who writes by an old map learns so.
ALTER TABLE counters ADD COLUMN epoch bigint NOT NULL DEFAULT 1;
ALTER TABLE collections DROP COLUMN epoch;

-- Long operations. One of a collection runs at a time; what it is doing is read off the collection itself.
CREATE TABLE jobs (
    id             uuid PRIMARY KEY,
    collection_uid bigint NOT NULL REFERENCES collections ON DELETE CASCADE,
    kind           text NOT NULL,
    state          text NOT NULL CHECK (state IN ('running', 'succeeded', 'failed', 'cancelled')),
    -- What it is about, by kind: the shard, or the number of replicas.
    argument       integer NOT NULL,
    message        text NOT NULL DEFAULT '',
    started_at_us  bigint NOT NULL DEFAULT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint,
    ended_at_us    bigint
);
CREATE UNIQUE INDEX jobs_running ON jobs (collection_uid) WHERE state = 'running';
CREATE INDEX jobs_started ON jobs (collection_uid, started_at_us);
