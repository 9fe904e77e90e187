-- Where a batch lands by COPY, the fastest way in, before it is merged. One for each connection.
CREATE TEMPORARY TABLE IF NOT EXISTS evalvault_sdk_staging (
    ordinal INTEGER,
    run_id TEXT,
    stage_id TEXT,
    parent_stage_id TEXT,
    stage_type TEXT,
    stage_name TEXT,
    status TEXT,
    attempt INTEGER,
    started_at TIMESTAMP WITH TIME ZONE,
    finished_at TIMESTAMP WITH TIME ZONE,
    duration_ms DOUBLE PRECISION,
    input_ref TEXT,
    output_ref TEXT,
    attributes TEXT,
    metadata TEXT,
    trace_id TEXT,
    span_id TEXT
) ON COMMIT DELETE ROWS;
