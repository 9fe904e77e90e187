-- One row per stage type, in the order in which the types first appeared. All of it is in the index on
-- (run_id, stage_type, id), which spares a million rows their pages.
SELECT
    stage_type,
    COUNT(*) AS events,
    COUNT(CASE WHEN status = 'error' THEN 1 END) AS errors,
    AVG(duration_ms) AS mean_ms,
    COUNT(duration_ms) AS timed_events
FROM stage_events
WHERE run_id = :run_id
GROUP BY stage_type
ORDER BY MIN(id)
