-- The registry of collections and the logs' counters. A collection's own tables are made with it
-- (queries.sql, create_tables).
CREATE SCHEMA IF NOT EXISTS ringfort;

CREATE TABLE migrations (
    number     integer PRIMARY KEY,
    name       text NOT NULL,
    applied_at timestamptz NOT NULL DEFAULT now()
);

-- One row. A log belongs to one database on one timeline: what is restored elsewhere is another log.
CREATE TABLE logs (
    log_id   uuid NOT NULL DEFAULT gen_random_uuid(),
    identity text NOT NULL
);
CREATE UNIQUE INDEX logs_one_row ON logs ((true));
INSERT INTO logs (identity) VALUES ('');

CREATE TABLE collections (
    uid              bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    tenant           text NOT NULL,
    name             text NOT NULL,
    dim              integer NOT NULL,
    metric           text NOT NULL,
    schema           json NOT NULL, -- json, not jsonb: the order of declaration is kept
    schema_version   integer NOT NULL DEFAULT 1,
    model            text,
    slots            integer NOT NULL,
    shards           integer NOT NULL,
    replicas         integer NOT NULL,
    index            text NOT NULL,
    max_staleness_ms bigint NOT NULL,
    generation       integer NOT NULL DEFAULT 1,
    space            text NOT NULL,
    epoch            bigint NOT NULL DEFAULT 1,
    created_at_us    bigint NOT NULL DEFAULT (extract(epoch FROM now()) * 1000000)::bigint,
    UNIQUE (tenant, name)
);

CREATE TABLE aliases (
    tenant         text NOT NULL,
    alias          text NOT NULL,
    collection_uid bigint NOT NULL REFERENCES collections ON DELETE CASCADE,
    PRIMARY KEY (tenant, alias)
);

-- The last position of each log and its number of transactions. Its row lock is what orders writers.
CREATE TABLE counters (
    collection_uid bigint PRIMARY KEY REFERENCES collections ON DELETE CASCADE,
    seq            bigint NOT NULL DEFAULT 0,
    writes         bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

-- The latest transactions of each log, in a ring: recognises one whose COMMIT was never answered.
-- No foreign key: its check would lock the collection's row on every write.
CREATE TABLE recent_writes (
    collection_uid bigint NOT NULL,
    place          integer NOT NULL,
    write_id       uuid NOT NULL CONSTRAINT recent_writes_write_id UNIQUE,
    after          bigint NOT NULL,
    PRIMARY KEY (collection_uid, place)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000);
