WITH actions (kind, code, seconds) AS (
    VALUES (0, 'publish', 9.0), (1, 'update', 4.0), (2, 'sync', 25.0), (3, 'orders', 12.0), (4, 'delete', 2.0),
           (5, 'message', 1.5), (6, 'link_product', 3.0)
),
-- Every day of the demo with the number of its jobs: fewer on weekends, slowly growing, with some noise.
days AS (
    SELECT day, day - date '2000-01-01' AS day_number,
           round(%(job_count)s / %(day_count)s::float8
                 * (ARRAY[1.12, 1.2, 1.15, 1.13, 1.05, 0.75, 0.6])[extract(isodow FROM day)::integer]
                 * (0.85 + 0.3 * age / %(day_count)s)
                 * (0.9 + 0.2 * pg_temp.noise('day', day - date '2000-01-01', %(seed)s)))::integer AS job_count
      FROM generate_series(0, %(day_count)s - 1) AS age
     CROSS JOIN LATERAL (SELECT %(today)s::date - %(day_count)s + age AS day) AS dated
),
-- Every job: where, what, and when it was asked for. One sync in ten is a long one just before midnight.
drawn AS (
    SELECT n, day, code, seconds, marketplace, is_nightly,
           marketplace = 'ebay' AND code = 'publish' AND day = %(outage)s::date AS is_outage,
           marketplace = 'vinted' AND day >= %(cut_off)s::date AS is_cut_off,
           marketplace = 'etsy' AND day >= %(slow)s::date AS is_slow,
           day::timestamp AT TIME ZONE 'UTC' + make_interval(secs => 86400 * CASE
               WHEN is_nightly THEN 1 - 0.01 * pg_temp.noise('time', n, %(seed)s)
               ELSE 0.25 + 0.35 * (pg_temp.noise('time', n, %(seed)s) + pg_temp.noise('time 2', n, %(seed)s))
           END) AS created_at
      FROM days
     CROSS JOIN LATERAL generate_series(1, days.job_count) AS i
     CROSS JOIN LATERAL (SELECT day_number * 100000::bigint + i AS n) AS numbered
      JOIN actions
        ON kind = width_bucket(pg_temp.noise('action', n, %(seed)s),
                               ARRAY[0.36, 0.58, 0.74, 0.84, 0.92, 0.97]::float8[])
     CROSS JOIN LATERAL (
        SELECT (ARRAY['vinted', 'ebay', 'etsy', 'depop'])[1 + width_bucket(
                   pg_temp.noise('marketplace', n, %(seed)s), ARRAY[0.55, 0.83, 0.999]::float8[])] AS marketplace,
               code = 'sync' AND pg_temp.noise('nightly', n, %(seed)s) < 0.1 AS is_nightly) AS chosen
),
-- How each would end, were there no midnight.
ended AS (
    SELECT drawn.*, pg_temp.noise('oddity', n, %(seed)s) AS oddity, status, started_at,
           CASE status WHEN 'expired' THEN created_at + interval '1 hour'
                       WHEN 'cancelled' THEN created_at + interval '9 minutes' * pg_temp.noise('cancel', n, %(seed)s)
                       ELSE started_at + make_interval(secs => CASE
                           WHEN is_outage AND status = 'failed' THEN 60 + 5 * pg_temp.noise('length', n, %(seed)s)
                           ELSE seconds
                                * CASE WHEN is_nightly THEN 20 ELSE 1 END
                                * CASE WHEN is_slow THEN 3 ELSE 1 END
                                * CASE marketplace WHEN 'ebay' THEN 0.7 WHEN 'etsy' THEN 0.85 ELSE 1.1 END
                                * CASE status WHEN 'failed' THEN 1.4 ELSE 1 END
                                * exp(1.6 * (pg_temp.noise('length', n, %(seed)s)
                                             + pg_temp.noise('length 2', n, %(seed)s) - 1))
                       END)
           END AS completed_at
      FROM drawn
     CROSS JOIN LATERAL (
        SELECT CASE WHEN is_outage THEN 0.85 WHEN is_cut_off THEN 0.7 WHEN marketplace = 'etsy' THEN 0.02 WHEN code = 'publish' THEN 0.06
                    ELSE 0.03 END AS failure_share) AS odds
     CROSS JOIN LATERAL (
        SELECT (ARRAY['failed', 'cancelled', 'expired', 'completed'])[1 + width_bucket(
                   pg_temp.noise('status', n, %(seed)s),
                   ARRAY[failure_share, failure_share + 0.012, failure_share + 0.02]::float8[])] AS status) AS chosen
     CROSS JOIN LATERAL (
        SELECT CASE WHEN status IN ('completed', 'failed')
                    THEN created_at + make_interval(
                             secs => (1 + 30 * pg_temp.noise('wait', n, %(seed)s)) * CASE WHEN is_slow THEN 4 ELSE 1 END)
               END AS started_at) AS waited
),
-- The demo is a picture taken at midnight: what would end today is still under way. And a few rows are odd, as in real
-- life: a start that is missing or after the end, an end that was never written, a job that nobody ever picked up.
pictured AS (
    SELECT n, marketplace, code, is_outage, is_cut_off, created_at,
           CASE WHEN is_stuck THEN 'pending'
                WHEN completed_at < midnight THEN status
                WHEN started_at < midnight THEN 'running'
                ELSE 'pending' END AS status,
           CASE WHEN is_stuck OR oddity < 0.0006 THEN NULL
                WHEN oddity < 0.0009 THEN completed_at + interval '2 seconds'
                WHEN started_at < midnight THEN started_at END AS started_at,
           CASE WHEN is_stuck OR oddity BETWEEN 0.0009 AND 0.0012 THEN NULL
                WHEN completed_at < midnight THEN completed_at END AS completed_at
      FROM ended
     CROSS JOIN LATERAL (
        SELECT %(today)s::date::timestamp AT TIME ZONE 'UTC' AS midnight,
               oddity BETWEEN 0.0012 AND 0.002 AS is_stuck) AS limits
)
INSERT INTO {jobs} (marketplace, action_type_id, product_id, status, priority, retry_count, error_message, input_data,
                    started_at, completed_at, expires_at, created_at)
SELECT pictured.marketplace, action.id, 1000 + (900 * pg_temp.noise('product', n, %(seed)s))::integer,
       status::{job_status}, 1 + (3 * pg_temp.noise('priority', n, %(seed)s))::integer,
       CASE WHEN status = 'failed' AND is_outage THEN 3
            WHEN status = 'failed' THEN (3 * pg_temp.noise('retries', n, %(seed)s))::integer
            WHEN status = 'completed' AND pg_temp.noise('retries', n, %(seed)s) < 0.06 THEN 1
            ELSE 0 END,
       CASE WHEN status <> 'failed' THEN NULL
            WHEN is_outage THEN 'no answer from eBay within 60 s'
            WHEN is_cut_off THEN 'HTTP 401: the connection of ' || %(schema)s || ' to Vinted has expired'
            ELSE 'the marketplace refused the request' END,
       jsonb_build_object('source', 'demo'),
       started_at, completed_at, pictured.created_at + interval '1 hour', pictured.created_at
  FROM pictured
  -- A marketplace that the application does not know yet borrows Vinted's action types.
  JOIN public.marketplace_action_types AS action
    ON action.code = pictured.code
   AND action.marketplace = CASE pictured.marketplace WHEN 'depop' THEN 'vinted' ELSE pictured.marketplace END
 ORDER BY pictured.created_at, n
