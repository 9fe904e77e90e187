-- Each run and the place of its last event, the newest first. It leaps from run to run along the index on
-- (run_id, id): ten runs of a million events cost ten leaps.
WITH RECURSIVE found (run_id) AS (
    (SELECT run_id FROM stage_events ORDER BY run_id LIMIT 1)
    UNION ALL
    SELECT (SELECT e.run_id FROM stage_events AS e WHERE e.run_id > found.run_id ORDER BY e.run_id LIMIT 1)
    FROM found WHERE found.run_id IS NOT NULL
)
SELECT run_id::text, (SELECT MAX(e.id) FROM stage_events AS e WHERE e.run_id = found.run_id) AS last_place
FROM found WHERE run_id IS NOT NULL
ORDER BY last_place DESC
