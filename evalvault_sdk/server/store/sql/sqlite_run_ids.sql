-- Each run and the place of its last event, the newest first. It leaps from run to run along the index on
-- run_id: ten runs of a million events cost ten leaps.
WITH RECURSIVE found (run_id) AS (
    SELECT MIN(run_id) FROM stage_events
    UNION ALL
    SELECT (SELECT MIN(run_id) FROM stage_events WHERE run_id > found.run_id)
    FROM found WHERE found.run_id IS NOT NULL
)
SELECT run_id, (SELECT MAX(id) FROM stage_events WHERE run_id = found.run_id) AS last_place
FROM found WHERE run_id IS NOT NULL
ORDER BY last_place DESC
