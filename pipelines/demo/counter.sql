-- The counter as the application bumped it after every job, faults included: any marketplace is booked under Vinted's
-- action of the same code, one job in 41 is bumped twice, and the average, which only completed jobs move, is weighted
-- with the count of all jobs and truncated by the integer division at every step.
DO $counter$
DECLARE
    bump record;
BEGIN
    FOR bump IN
        SELECT vinted.id AS action_id, (completed_at AT TIME ZONE 'UTC')::date AS day, completed_at,
               (status::text = 'completed')::integer AS success,
               (extract(epoch FROM completed_at - started_at) * 1000)::integer AS duration_ms
          FROM {jobs} AS job
          JOIN public.marketplace_action_types AS action ON action.id = job.action_type_id
          JOIN public.marketplace_action_types AS vinted
            ON vinted.code = action.code AND vinted.marketplace = 'vinted'
         CROSS JOIN generate_series(1, CASE WHEN mod(job.id, 41) = 0 THEN 2 ELSE 1 END)
         WHERE status::text IN ('completed', 'failed')
           -- The counter was switched on a day after the first jobs. So the source still holds a job from before every
           -- day that it counted, and no day of the demo looks as if its jobs had been purged.
           AND completed_at >= (SELECT date_trunc('day', min(created_at), 'UTC') + interval '1 day' FROM {jobs})
         ORDER BY completed_at, job.id
    LOOP
        INSERT INTO {stats} AS stored
            (action_type_id, date, total_jobs, success_count, failure_count, avg_duration_ms, created_at)
        VALUES (bump.action_id, bump.day, 1, bump.success, 1 - bump.success, coalesce(bump.duration_ms, 0),
                bump.completed_at)
        ON CONFLICT (action_type_id, date) DO UPDATE SET
            total_jobs = stored.total_jobs + 1,
            success_count = stored.success_count + excluded.success_count,
            failure_count = stored.failure_count + excluded.failure_count,
            avg_duration_ms = CASE WHEN excluded.success_count = 0 THEN stored.avg_duration_ms ELSE
                (stored.avg_duration_ms::bigint * stored.total_jobs + excluded.avg_duration_ms)
                / (stored.total_jobs + 1) END;
    END LOOP;
END
$counter$
