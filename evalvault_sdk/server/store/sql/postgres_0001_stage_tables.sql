-- EvalVault's own two tables (contract: "EvalVault's tables"), but that a run need not be in its table
-- evaluation_runs: a live run never is. IF NOT EXISTS: a database that EvalVault made is used as it is.
-- JSON, not JSONB: what was sent comes back as it was (order of keys, 1e300, a NUL character in a text).

CREATE TABLE IF NOT EXISTS stage_events (
    id BIGSERIAL PRIMARY KEY,
    run_id TEXT COLLATE "C" NOT NULL,
    stage_id TEXT COLLATE "C" NOT NULL,
    parent_stage_id TEXT,
    stage_type TEXT NOT NULL,
    stage_name TEXT,
    status TEXT,
    attempt INTEGER DEFAULT 1,
    started_at TIMESTAMP WITH TIME ZONE,
    finished_at TIMESTAMP WITH TIME ZONE,
    duration_ms DOUBLE PRECISION,
    input_ref JSON,
    output_ref JSON,
    attributes JSON,
    metadata JSON,
    trace_id TEXT,
    span_id TEXT
);

CREATE UNIQUE INDEX IF NOT EXISTS idx_stage_events_run_stage_id ON stage_events(run_id, stage_id);
CREATE INDEX IF NOT EXISTS idx_stage_events_stage_type ON stage_events(stage_type);

CREATE TABLE IF NOT EXISTS stage_metrics (
    id BIGSERIAL PRIMARY KEY,
    run_id TEXT COLLATE "C" NOT NULL,
    stage_id TEXT COLLATE "C" NOT NULL,
    metric_name TEXT NOT NULL,
    score DOUBLE PRECISION NOT NULL,
    threshold DOUBLE PRECISION,
    evidence JSON
);

CREATE INDEX IF NOT EXISTS idx_stage_metrics_run_id ON stage_metrics(run_id);
CREATE INDEX IF NOT EXISTS idx_stage_metrics_stage_id ON stage_metrics(stage_id);
