-- All that the totals of a run's stage types are made of. With the place before the rest, so that what is stored comes
-- to the end of its type: an index in the order of durations would change a page of the disk for nearly each event.

CREATE INDEX IF NOT EXISTS idx_evalvault_sdk_totals ON stage_events(run_id, stage_type, id, duration_ms, status);
