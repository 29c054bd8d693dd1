-- Canaries: at most one version of a name beside the live one, with a share of its traffic. Rankers are versions
-- too; their manifest is all there is of them.
ALTER TABLE models
    ADD COLUMN kind text NOT NULL DEFAULT 'embedding' CHECK (kind IN ('embedding', 'ranker')),
    ADD COLUMN traffic_percent integer NOT NULL DEFAULT 0 CHECK (traffic_percent BETWEEN 0 AND 100),
    ADD CHECK ((state = 'canary') = (traffic_percent > 0));
CREATE UNIQUE INDEX models_canary ON models (name) WHERE state = 'canary';
