-- Column types are the table's own: ours are TEXT and JSON, EvalVault's are UUID and JSONB.
-- Numbers are given in the order of the batch; rows are locked in the order of their keys, so that batches which
-- bring the same events in another order wait for each other instead of holding each other up.
INSERT INTO stage_events (
    id, run_id, stage_id, parent_stage_id, stage_type, stage_name, status, attempt, started_at, finished_at,
    duration_ms, input_ref, output_ref, attributes, metadata, trace_id, span_id
)
SELECT
    id, run_id::{run_type}, stage_id, parent_stage_id, stage_type, stage_name, status, attempt, started_at,
    finished_at, duration_ms, input_ref::{json_type}, output_ref::{json_type}, attributes::{json_type},
    metadata::{json_type}, trace_id, span_id
FROM (
    SELECT nextval('{sequence}') AS id, batch.*
    FROM (SELECT * FROM evalvault_sdk_staging ORDER BY ordinal) AS batch
) AS numbered
ORDER BY run_id, stage_id
ON CONFLICT (run_id, stage_id) DO UPDATE SET
    parent_stage_id = excluded.parent_stage_id,
    stage_type = excluded.stage_type,
    stage_name = excluded.stage_name,
    status = excluded.status,
    attempt = excluded.attempt,
    started_at = excluded.started_at,
    finished_at = excluded.finished_at,
    duration_ms = excluded.duration_ms,
    input_ref = excluded.input_ref,
    output_ref = excluded.output_ref,
    attributes = excluded.attributes,
    metadata = excluded.metadata,
    trace_id = excluded.trace_id,
    span_id = excluded.span_id
