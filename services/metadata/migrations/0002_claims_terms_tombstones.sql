-- A log restored elsewhere begins a new term: its versions are greater than any that were told before, whatever
-- their positions, so that no `if_version` of what was lost can hold by accident.
ALTER TABLE logs ADD COLUMN term bigint NOT NULL DEFAULT 1;

-- claim: carried by the writes of the one service that may; whoever takes it waits for the writes under way.
-- purge_floor: of what was deleted at or below this position, the log may no longer know.
ALTER TABLE counters ADD COLUMN claim uuid, ADD COLUMN purge_floor bigint NOT NULL DEFAULT 0;

-- Where each log stood at a time: tells the age of a tombstone without a time in every row.
CREATE TABLE marks (
    collection_uid bigint NOT NULL REFERENCES counters ON DELETE CASCADE,
    seq            bigint NOT NULL,
    at             timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (collection_uid, seq)
);

-- Tombstones by position, for the purge.
DO $$
DECLARE
    one bigint;
BEGIN
    FOR one IN SELECT uid FROM collections LOOP
        EXECUTE format('CREATE INDEX documents_%s_dead ON documents_%s (seq) WHERE deleted', one, one);
    END LOOP;
END
$$;
