-- The durations that stand at three places among those of a stage type, the shortest at 1.
SELECT place, duration_ms
FROM (
    SELECT duration_ms, ROW_NUMBER() OVER (ORDER BY duration_ms) AS place
    FROM stage_events
    WHERE run_id = :run_id AND {stage_type} AND duration_ms IS NOT NULL
) AS timed
WHERE place IN (:p50, :p95, :p99)
