-- One row per stage type, in the order in which the types first appeared. A percentile is the smallest
-- duration that at least that share of the timed stages does not exceed (nearest rank).
WITH timed AS (
    SELECT
        stage_type,
        duration_ms,
        ROW_NUMBER() OVER (PARTITION BY stage_type ORDER BY duration_ms) AS place,
        COUNT(*) OVER (PARTITION BY stage_type) AS timed_events
    FROM stage_events
    WHERE run_id = :run_id AND duration_ms IS NOT NULL
),
percentiles AS (
    SELECT
        stage_type,
        MIN(CASE WHEN place >= 0.50 * timed_events THEN duration_ms END) AS p50_ms,
        MIN(CASE WHEN place >= 0.95 * timed_events THEN duration_ms END) AS p95_ms,
        MIN(CASE WHEN place >= 0.99 * timed_events THEN duration_ms END) AS p99_ms
    FROM timed
    GROUP BY stage_type
),
totals AS (
    SELECT
        stage_type,
        MIN(id) AS first_id,
        COUNT(*) AS events,
        SUM(status = 'error') AS errors,
        AVG(duration_ms) AS mean_ms
    FROM stage_events
    WHERE run_id = :run_id
    GROUP BY stage_type
)
SELECT stage_type, events, COALESCE(errors, 0) AS errors, mean_ms, p50_ms, p95_ms, p99_ms
FROM totals LEFT JOIN percentiles USING (stage_type)
ORDER BY first_id
