-- One row per stage type, in the order in which the types first appeared. A percentile is the smallest
-- duration that at least that share of the timed stages does not exceed (nearest rank).
SELECT
    stage_type,
    COUNT(*) AS events,
    COUNT(*) FILTER (WHERE status = 'error') AS errors,
    AVG(duration_ms) AS mean_ms,
    PERCENTILE_DISC(0.50) WITHIN GROUP (ORDER BY duration_ms) AS p50_ms,
    PERCENTILE_DISC(0.95) WITHIN GROUP (ORDER BY duration_ms) AS p95_ms,
    PERCENTILE_DISC(0.99) WITHIN GROUP (ORDER BY duration_ms) AS p99_ms
FROM stage_events
WHERE run_id = :run_id
GROUP BY stage_type
ORDER BY MIN(id)
