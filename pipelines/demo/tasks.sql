-- Jobs by their rank, not by their id: the ids of cloned tenants come from one sequence for all.
WITH jobs AS (
    SELECT job.id, row_number() OVER (ORDER BY job.id) AS n, marketplace, status::text AS status, created_at,
           error_message LIKE 'no answer%%' AS is_outage,
           coalesce(least(started_at, completed_at), created_at) AS began_at,
           coalesce(completed_at, started_at + interval '5 seconds') AS ended_at
      FROM {jobs} AS job
),
steps AS (
    SELECT jobs.*, step, task_count, n * 10 + step AS m,
           CASE status WHEN 'failed' THEN 1 + floor(task_count * pg_temp.noise('breaks', n, %(seed)s))::integer
                       ELSE task_count END AS last_step
      FROM jobs
     CROSS JOIN LATERAL (SELECT 2 + floor(3 * pg_temp.noise('tasks', n, %(seed)s))::integer AS task_count) AS sized
     CROSS JOIN LATERAL generate_series(1, task_count) AS step
),
-- A failed job stops at the task that broke; what came after it was never tried.
ended AS (
    SELECT steps.*,
           CASE WHEN status IN ('cancelled', 'expired') THEN 'cancelled'
                WHEN status = 'running' AND step = 1 THEN 'processing'
                WHEN status IN ('running', 'pending') THEN 'pending'
                WHEN step > last_step THEN 'cancelled'
                WHEN status = 'completed' OR step < last_step THEN 'success'
                WHEN is_outage OR pg_temp.noise('timeout', n, %(seed)s) < 0.3 THEN 'timeout'
                ELSE 'failed' END AS task_status
      FROM steps
)
INSERT INTO {tasks} (job_id, task_type, status, retry_count, started_at, completed_at, created_at, payload)
-- Now and then a task's job was deleted, or its type never written.
SELECT CASE WHEN pg_temp.noise('orphan', m, %(seed)s) >= 0.0004 THEN id END,
       CASE WHEN pg_temp.noise('type', m, %(seed)s) < 0.002 THEN NULL
            WHEN step = task_count THEN 'db_operation'
            WHEN step = 2 THEN 'file_operation'
            WHEN marketplace = 'vinted' THEN 'plugin_http'
            ELSE 'direct_http' END,
       task_status::{task_status},
       CASE WHEN task_status IN ('failed', 'timeout') THEN 1 + (2 * pg_temp.noise('again', m, %(seed)s))::integer
            WHEN task_status = 'success' AND pg_temp.noise('again', m, %(seed)s) < 0.04 THEN 1
            ELSE 0 END,
       CASE WHEN task_status IN ('success', 'failed', 'timeout', 'processing')
            THEN began_at + (ended_at - began_at) * ((step - 1)::float8 / last_step) END,
       CASE WHEN task_status IN ('success', 'failed', 'timeout')
            THEN began_at + (ended_at - began_at) * (step::float8 / last_step) END,
       created_at, jsonb_build_object('step', step)
  FROM ended
 ORDER BY n, step
