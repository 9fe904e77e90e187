SELECT
    COUNT(*) AS events,
    COUNT(*) FILTER (WHERE status = 'error') AS errors,
    COUNT(DISTINCT trace_id) AS traces,
    MIN(started_at)::text AS started_at,
    MAX(finished_at)::text AS finished_at,
    (
        SELECT trace_id FROM stage_events WHERE run_id = :run_id AND trace_id <> ''
        ORDER BY duration_ms DESC NULLS LAST, id LIMIT 1
    ) AS slowest_trace_id
FROM stage_events
WHERE run_id = :run_id
