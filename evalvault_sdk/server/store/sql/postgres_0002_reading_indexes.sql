-- A run in its order (EvalVault's index on run_id alone is in none), the stages of one trace, and how many
-- stages of a run failed.

CREATE INDEX IF NOT EXISTS idx_evalvault_sdk_place ON stage_events(run_id, id);
CREATE INDEX IF NOT EXISTS idx_evalvault_sdk_trace ON stage_events(run_id, trace_id, id);
CREATE INDEX IF NOT EXISTS idx_evalvault_sdk_errors ON stage_events(run_id) WHERE status = 'error';
