-- Documents in several databases. Each has all tables; what only the home's are used for stays empty elsewhere.

-- `service` is the same in a home and its partitions; `partition` is this database's name among them, null in a
-- home, and in what belongs to nobody yet.
ALTER TABLE logs ADD COLUMN service uuid NOT NULL DEFAULT gen_random_uuid(), ADD COLUMN partition text;

-- Where a collection's documents lie. A partition has a row of the same uid and time, under a name without meaning.
ALTER TABLE collections ADD COLUMN databases text[] NOT NULL DEFAULT '{home}';

-- In a home: partitions that may hold tables of a collection that is not there, or not yet, or no more.
CREATE TABLE leftovers (
    collection_uid bigint NOT NULL,
    created_at_us  bigint NOT NULL,
    database       text NOT NULL,
    since          timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (collection_uid, database)
);
