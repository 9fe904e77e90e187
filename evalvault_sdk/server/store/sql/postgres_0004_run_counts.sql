-- How many events each run has, which a first page tells: to count a million takes a tenth of a second. It is kept by
-- triggers, for EvalVault writes into this table too, and in the transaction of whoever writes, so that it is exact in
-- every snapshot. Each session has a row of its own, and the count is their sum: no writer ever waits for another.
-- With the rights of the tables' owner: who may write events need not know of this table.

CREATE TABLE IF NOT EXISTS evalvault_sdk_run_counts (
    run_id TEXT COLLATE "C" NOT NULL,
    session INTEGER NOT NULL,
    events BIGINT NOT NULL,
    PRIMARY KEY (run_id, session)
) WITH (fillfactor = 50);

CREATE OR REPLACE FUNCTION evalvault_sdk_count_changed() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO evalvault_sdk_run_counts AS counts (run_id, session, events)
    SELECT run_id::text, pg_backend_pid(), CASE TG_OP WHEN 'INSERT' THEN COUNT(*) ELSE -COUNT(*) END
    FROM changed GROUP BY run_id
    ON CONFLICT (run_id, session) DO UPDATE SET events = counts.events + excluded.events;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION evalvault_sdk_count_moved() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    INSERT INTO evalvault_sdk_run_counts AS counts (run_id, session, events)
    VALUES (OLD.run_id::text, pg_backend_pid(), -1), (NEW.run_id::text, pg_backend_pid(), 1)
    ON CONFLICT (run_id, session) DO UPDATE SET events = counts.events + excluded.events;
    RETURN NULL;
END $$;

CREATE OR REPLACE FUNCTION evalvault_sdk_count_none() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path FROM CURRENT AS $$
BEGIN
    DELETE FROM evalvault_sdk_run_counts;
    RETURN NULL;
END $$;

-- Nobody writes between this count and the first that is kept.
LOCK TABLE stage_events IN SHARE ROW EXCLUSIVE MODE;
DELETE FROM evalvault_sdk_run_counts;
INSERT INTO evalvault_sdk_run_counts SELECT run_id::text, 0, COUNT(*) FROM stage_events GROUP BY run_id;

DROP TRIGGER IF EXISTS evalvault_sdk_stored ON stage_events;
CREATE TRIGGER evalvault_sdk_stored AFTER INSERT ON stage_events
REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION evalvault_sdk_count_changed();
DROP TRIGGER IF EXISTS evalvault_sdk_deleted ON stage_events;
CREATE TRIGGER evalvault_sdk_deleted AFTER DELETE ON stage_events
REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION evalvault_sdk_count_changed();
DROP TRIGGER IF EXISTS evalvault_sdk_moved ON stage_events;
CREATE TRIGGER evalvault_sdk_moved AFTER UPDATE OF run_id ON stage_events
FOR EACH ROW WHEN (OLD.run_id <> NEW.run_id) EXECUTE FUNCTION evalvault_sdk_count_moved();
DROP TRIGGER IF EXISTS evalvault_sdk_emptied ON stage_events;
CREATE TRIGGER evalvault_sdk_emptied AFTER TRUNCATE ON stage_events
FOR EACH STATEMENT EXECUTE FUNCTION evalvault_sdk_count_none();
