-- Times are compared as instants (julianday knows offsets): their text may have different offsets.
SELECT
    (SELECT COUNT(*) FROM stage_events WHERE run_id = :run_id) AS events,
    (SELECT COUNT(*) FROM stage_events WHERE run_id = :run_id AND status = 'error') AS errors,
    (SELECT COUNT(DISTINCT trace_id) FROM stage_events WHERE run_id = :run_id) AS traces,
    (
        SELECT started_at FROM stage_events WHERE run_id = :run_id AND julianday(started_at) IS NOT NULL
        ORDER BY julianday(started_at), started_at LIMIT 1
    ) AS started_at,
    (
        SELECT finished_at FROM stage_events WHERE run_id = :run_id AND julianday(finished_at) IS NOT NULL
        ORDER BY julianday(finished_at) DESC, finished_at DESC LIMIT 1
    ) AS finished_at,
    (
        SELECT trace_id FROM stage_events WHERE run_id = :run_id AND trace_id <> ''
        ORDER BY duration_ms DESC, id LIMIT 1
    ) AS slowest_trace_id
