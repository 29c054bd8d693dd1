-- Generations: complete indexes of a collection, each in one embedding space, with a table of vectors of its own.

-- In a home: what each generation is. What the live one is stands in the collection's own row, too.
CREATE TABLE generations (
    collection_uid bigint NOT NULL REFERENCES collections ON DELETE CASCADE,
    number         integer NOT NULL,
    state          text NOT NULL CHECK (state IN ('building', 'ready', 'live', 'previous', 'dropped')),
    model          text,
    dim            integer NOT NULL,
    space          text NOT NULL,
    index          text NOT NULL,
    PRIMARY KEY (collection_uid, number)
);
CREATE UNIQUE INDEX generations_live ON generations (collection_uid) WHERE state = 'live';
INSERT INTO generations (collection_uid, number, state, model, dim, space, index)
SELECT uid, generation, 'live', model, dim, space, index FROM collections;

-- In every database: its tables of vectors, and up to which position of the log each has those of all documents.
-- Of the live one that is not told: every write brings its vectors.
CREATE TABLE embedded (
    collection_uid bigint NOT NULL REFERENCES counters ON DELETE CASCADE,
    generation     integer NOT NULL,
    upto           bigint NOT NULL DEFAULT 0,
    PRIMARY KEY (collection_uid, generation)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);
INSERT INTO embedded (collection_uid, generation)
SELECT uid, generation FROM collections JOIN counters ON collection_uid = uid;

-- The generation that writes bring vectors of; 0 while nothing may be written.
ALTER TABLE counters ADD COLUMN generation integer NOT NULL DEFAULT 1;

-- What a job has found out, by name: the comparison of two generations.
ALTER TABLE jobs ADD COLUMN figures json NOT NULL DEFAULT '{}';
