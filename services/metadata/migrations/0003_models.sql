-- Versions of models. One version of a name is live; a promotion numbers its turn, so that a rollback knows
-- what came before.
CREATE SEQUENCE model_promotions;

CREATE TABLE models (
    name             text COLLATE "C" NOT NULL,
    version          text COLLATE "C" NOT NULL,
    state            text NOT NULL DEFAULT 'staged' CHECK (state IN ('staged', 'canary', 'live', 'retired')),
    artifact         text NOT NULL,
    manifest         text NOT NULL,
    promotion        bigint,
    registered_at_us bigint NOT NULL DEFAULT (extract(epoch FROM now()) * 1000000)::bigint,
    PRIMARY KEY (name, version)
);
CREATE UNIQUE INDEX models_live ON models (name) WHERE state = 'live';
