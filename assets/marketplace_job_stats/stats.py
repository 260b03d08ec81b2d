"""The stats of a day, which are the aggregate of its facts; and what is written beside them: ledger and journal.

Parameters of all: those of `Window.parameters`, `days` (an array of dates), and what each statement names.
"""

from assets import sketch
from assets.marketplace_job_stats.facts import FINISHED, RAN
from assets.marketplace_job_stats.statement import Statement

JOB_COUNTS = (
    "total_jobs",
    "success_count",
    "failure_count",
    "cancelled_count",
    "expired_count",
    "retry_count",
    "duration_count",
    "duration_sum_ms",
    "wait_count",
    "wait_sum_ms",
)
TASK_COUNTS = ("total_tasks", "task_success_count", "task_failure_count", "task_retry_count")
COUNTS = (*JOB_COUNTS, *TASK_COUNTS)
"""The columns that add up over rows."""
NUMBERS = (
    *COUNTS,
    "avg_duration_ms",
    "p50_duration_ms",
    "p95_duration_ms",
    "p99_duration_ms",
    "duration_sketch_keys",
    "duration_sketch_counts",
    "duration_sketch_version",
    "avg_wait_ms",
    "p50_wait_ms",
    "p95_wait_ms",
    "wait_sketch_keys",
    "wait_sketch_counts",
    "wait_sketch_version",
)
"""All that is computed for a row."""
KEY = ("date", "action_type_id", "marketplace")


def _counts(of: str) -> str:
    """How often each bucket occurs: mostly once each, or there is one, which needs no counting."""
    return (
        f"CASE WHEN {of}_count = cardinality({of}_keys) THEN array_fill(1::bigint, ARRAY[{of}_count]) "
        f"WHEN cardinality({of}_keys) = 1 THEN ARRAY[{of}_count::bigint] "
        f"ELSE (SELECT array_agg(number ORDER BY middle) FROM (SELECT middle, count(*) AS number "
        f"FROM unnest({of}s) AS middle WHERE middle IS NOT NULL GROUP BY middle) AS bucket) END"
    )


def _percentile(of: str, share: str) -> str:
    """The value of rank ceil(q n). In doubles that is exact: where q n is a whole number, the product is rounded to it,
    for the double next to 19/20 is nearer to it than half of what a product can tell apart."""
    return f"{of}s[ceil({share}::float8 * {of}_count)::integer]"


def _mean(of: str) -> str:
    """Whole numbers only, so that the mean is exact: sum / count rounded is (2 sum + count) / (2 count) cut off."""
    return f"((2 * {of}_sum_ms + {of}_count) / nullif(2 * {of}_count, 0))::integer"


def _tasks(name: str) -> str:
    """A sum over the tasks of jobs that ran. Those of one that did not are none, but known; unknown ones are null."""
    return f"sum(CASE WHEN status IN {RAN} THEN {name} ELSE 0 * {name} END)"


# One row per date, action type and marketplace of the facts of these days. All are read once, and grouped once.
_COUNTED = f"""
    SELECT date, action_type_id, marketplace, success_count + failure_count AS total_jobs, success_count, failure_count,
           cancelled_count, expired_count, retry_count, duration_count, duration_sum_ms, wait_count, wait_sum_ms,
           task_success_count + task_failure_count AS total_tasks, task_success_count, task_failure_count,
           task_retry_count,
           {_mean("duration")} AS avg_duration_ms,
           {_percentile("duration", "0.5")} AS p50_duration_ms,
           {_percentile("duration", "0.95")} AS p95_duration_ms,
           {_percentile("duration", "0.99")} AS p99_duration_ms,
           duration_keys AS duration_sketch_keys,
           {_counts("duration")} AS duration_sketch_counts,
           CASE WHEN duration_count > 0 THEN {sketch.VERSION}::smallint END AS duration_sketch_version,
           {_mean("wait")} AS avg_wait_ms,
           {_percentile("wait", "0.5")} AS p50_wait_ms,
           {_percentile("wait", "0.95")} AS p95_wait_ms,
           wait_keys AS wait_sketch_keys,
           {_counts("wait")} AS wait_sketch_counts,
           CASE WHEN wait_count > 0 THEN {sketch.VERSION}::smallint END AS wait_sketch_version
      FROM (SELECT date, action_type_id, marketplace,
                   (count(*) FILTER (WHERE status = 'completed'))::integer AS success_count,
                   (count(*) FILTER (WHERE status = 'failed'))::integer AS failure_count,
                   (count(*) FILTER (WHERE status = 'cancelled'))::integer AS cancelled_count,
                   (count(*) FILTER (WHERE status = 'expired'))::integer AS expired_count,
                   coalesce(sum(retry_count) FILTER (WHERE status IN {RAN}), 0) AS retry_count,
                   count(duration_ms)::integer AS duration_count,
                   coalesce(sum(duration_ms), 0) AS duration_sum_ms,
                   count(wait_key)::integer AS wait_count,
                   coalesce(sum(wait_ms) FILTER (WHERE wait_key IS NOT NULL), 0) AS wait_sum_ms,
                   {_tasks("task_success_count")}::integer AS task_success_count,
                   {_tasks("task_failure_count")}::integer AS task_failure_count,
                   {_tasks("task_retry_count")}::bigint AS task_retry_count,
                   array_agg({sketch.middle("duration_key")} ORDER BY duration_key) AS durations,
                   array_agg(DISTINCT duration_key ORDER BY duration_key)
                       FILTER (WHERE duration_key IS NOT NULL) AS duration_keys,
                   array_agg({sketch.middle("wait_key")} ORDER BY wait_key) AS waits,
                   array_agg(DISTINCT wait_key ORDER BY wait_key) FILTER (WHERE wait_key IS NOT NULL) AS wait_keys
              FROM (SELECT *, {sketch.bucket("duration_ms")} AS duration_key,
                           CASE WHEN status IN {RAN} THEN {sketch.bucket("wait_ms")} END AS wait_key
                      FROM {{schema}}.marketplace_job_facts
                     WHERE date = ANY (%(days)s::date[])) AS fact
             GROUP BY date, action_type_id, marketplace
            OFFSET 0) AS sums"""

# Whether a number of a row falls. A stored null, from before the batch knew the column, is no number and cannot fall.
_FALLS = "({})".format(" OR ".join(f"coalesce(coalesce(counted.{name}, 0) < stored.{name}, false)" for name in COUNTS))

_SUMS = "ARRAY[{}]::bigint[] AS sums".format(", ".join(f"sum({name})" for name in COUNTS))

STORED = Statement(
    """
    SELECT coalesce(stored.date, ledger.date)::date, ledger.time_zone, ledger.outcome::text, ledger.definition,
           ledger.job_count, ledger.unknown_marketplace_count, ledger.no_start_count, ledger.bad_duration_count,
           ledger.row_count IS NOT DISTINCT FROM stored.row_count
               AND ledger.row_versions IS NOT DISTINCT FROM stored.row_versions,
           stored.marketplace, stored.action_type_id, stored.row_count, stored.sums
      FROM (SELECT date, marketplace::text AS marketplace, action_type_id::bigint AS action_type_id,
                   count(*)::integer AS row_count, sum(xmin::text::bigint)::bigint AS row_versions, {sums}
              FROM {schema}.marketplace_job_stats
             WHERE date BETWEEN %(first_date)s::date AND %(last_date)s::date
             GROUP BY GROUPING SETS ((date), (marketplace, action_type_id))) AS stored
      FULL JOIN (SELECT date, time_zone, outcome, definition, job_count, unknown_marketplace_count, no_start_count,
                        bad_duration_count, nullif(row_count, 0) AS row_count, row_versions
                   FROM {schema}.marketplace_job_stats_days
                  WHERE date BETWEEN %(first_date)s::date AND %(last_date)s::date
                     OR time_zone <> %(time_zone)s::text) AS ledger
        ON ledger.date = stored.date""",
    sums=_SUMS,
)
"""What is stored of the window: a row per date, with what the ledger says of it, whether the stored rows are those that
it knows, and their sums; and a row per marketplace and action type, without a date. Days of the ledger that are in
another zone are there, too, wherever they lie."""

_COLUMNS = ", ".join((*KEY, *NUMBERS))

INSERT = Statement(
    """
    INSERT INTO {schema}.marketplace_job_stats ({columns}, computed_at, created_at)
    SELECT {columns}, now(), now() FROM ({counted}) AS counted""",
    columns=_COLUMNS,
    counted=_COUNTED,
)
"""Writes the stats of days of which nothing is stored."""

# A stored row that is younger than the ledger's entry was written by somebody else. Where a row only gets numbers that
# were unknown before, or where a new definition leaves its two numbers as they are, nobody has seen anything change.
UPDATE = Statement(
    """
    WITH difference AS MATERIALIZED (
        SELECT coalesce(counted.date, stored.date) AS key_date,
               coalesce(counted.action_type_id, stored.action_type_id) AS key_action_type_id,
               coalesce(counted.marketplace, stored.marketplace) AS key_marketplace,
               counted.*, stored.id AS stored_id, stored.total_jobs AS total_jobs_before,
               stored.failure_count AS failure_count_before, stored.xmin AS stored_xmin, {falls} AS falls,
               counted.date IS NULL OR stored.date IS NULL OR {known_differs} AS has_changed
          FROM ({counted}) AS counted
          FULL JOIN (SELECT xmin, id, date, action_type_id, marketplace::text AS marketplace, {numbers}
                       FROM {schema}.marketplace_job_stats
                      WHERE date = ANY (%(days)s::date[])) AS stored
            ON stored.date = counted.date AND stored.action_type_id = counted.action_type_id
           AND stored.marketplace = counted.marketplace
         WHERE counted.date IS NULL OR stored.date IS NULL OR {differs}
    ), inserted AS (
        INSERT INTO {schema}.marketplace_job_stats ({columns}, computed_at, created_at)
        SELECT {columns}, now(), now() FROM difference WHERE stored_id IS NULL
    ), updated AS (
        UPDATE {schema}.marketplace_job_stats AS stats
           SET {assignments}, computed_at = now()
          FROM difference
         WHERE difference.date IS NOT NULL AND stats.id = stored_id
    ), deleted AS (
        DELETE FROM {schema}.marketplace_job_stats AS stats
         USING difference
         WHERE difference.date IS NULL AND stats.id = stored_id
    ), journal AS (
        INSERT INTO {schema}.marketplace_job_stats_changes
               (date, action_type_id, marketplace, changed_at, run_id, cause, total_jobs_before, total_jobs_after,
                failure_count_before, failure_count_after, late_count, corrected_count, moved_in_count,
                moved_out_count, forgotten_count)
        SELECT key_date, key_action_type_id, key_marketplace, now(), %(run_id)s, cause,
               total_jobs_before, total_jobs, failure_count_before, failure_count,
               coalesce(late, 0), coalesce(corrected, 0), coalesce(moved_in, 0), coalesce(moved_out, 0),
               coalesce(forgotten, 0)
          FROM difference
          JOIN {schema}.marketplace_job_stats_days AS ledger
            ON ledger.date = key_date
           AND (ledger.outcome::text = 'computed'
                OR ledger.outcome::text = 'held_back' AND EXISTS (SELECT FROM {schema}.marketplace_job_stats AS stats
                            WHERE stats.date = key_date AND stats.computed_at IS NOT NULL))
          LEFT JOIN json_to_recordset(%(changes)s::json)
                    AS change (date date, action_type_id bigint, marketplace text, late integer, corrected integer,
                               moved_in integer, moved_out integer, forgotten integer, is_forgetful boolean)
            ON change.date = key_date AND change.action_type_id = key_action_type_id
           AND change.marketplace = key_marketplace
         CROSS JOIN LATERAL (VALUES (
               CASE WHEN age(stored_xmin) < age(ledger.xmin) THEN 'overwritten'
                    WHEN change.is_forgetful OR falls AND key_date = ANY (%(shrinking)s::date[]) THEN 'forgotten'
                    WHEN key_date = ANY (%(redefined)s::date[]) THEN 'definition'
                    WHEN change.date IS NULL AND ledger.outcome::text = 'computed' THEN 'overwritten'
                    ELSE 'jobs' END)) AS why (cause)
         WHERE has_changed
           AND (cause <> 'definition'
                OR (total_jobs_before, failure_count_before) IS DISTINCT FROM (total_jobs, failure_count))
        RETURNING date, action_type_id, marketplace, cause, total_jobs_before, total_jobs_after, failure_count_before,
                  failure_count_after, late_count, corrected_count, moved_in_count, moved_out_count, forgotten_count
    )
    SELECT key_date::date, count(*) FILTER (WHERE stored_id IS NULL) AS inserted,
           count(*) FILTER (WHERE stored_id IS NOT NULL AND date IS NOT NULL) AS updated,
           count(*) FILTER (WHERE date IS NULL) AS deleted,
           NULL::json AS changes
      FROM difference
     GROUP BY key_date
    UNION ALL
    SELECT NULL, count(*), NULL, NULL,
           (SELECT json_agg(journal) FROM (
                SELECT * FROM journal
                 ORDER BY abs(coalesce(total_jobs_after, 0) - coalesce(total_jobs_before, 0))
                          + abs(coalesce(failure_count_after, 0) - coalesce(failure_count_before, 0)) DESC
                 LIMIT 20) AS journal)
      FROM journal""",
    counted=_COUNTED,
    columns=_COLUMNS,
    numbers=", ".join(NUMBERS),
    differs=" OR ".join(f"counted.{name} IS DISTINCT FROM stored.{name}" for name in NUMBERS),
    falls=_FALLS,
    known_differs=" OR ".join(
        f"counted.{name} IS DISTINCT FROM coalesce(stored.{name}, counted.{name})" for name in COUNTS
    ),
    assignments=", ".join(f"{name} = difference.{name}" for name in NUMBERS),
)
"""Makes the stored rows of these days what their facts say, and notes changes of settled days in the journal.

Parameters: `run_id`; `changes`: as JSON, what has happened to the jobs of each row; `redefined`: the days that were of
an older definition; `shrinking`: those whose numbers may fall on request, though no facts account for them. Returns a
row per day with how many were written, and one without a date: how many lines the journal got, and the largest 20.
"""

HELD_BACK = Statement(
    """
    WITH falling AS (
        SELECT stored.date, coalesce(bool_or(stored.computed_at IS NOT NULL AND {falls}), false) AS is_exact
          FROM {schema}.marketplace_job_stats AS stored
          LEFT JOIN ({counted}) AS counted
            ON counted.date = stored.date AND counted.action_type_id = stored.action_type_id
           AND counted.marketplace = stored.marketplace::text
         WHERE stored.date = ANY (%(days)s::date[])
         GROUP BY stored.date
        HAVING bool_or({falls})
    )
    SELECT falling.date::date
      FROM falling
      JOIN unnest(%(days)s::date[], %(starts)s::timestamptz[]) AS day (date, starts_at) ON day.date = falling.date
     WHERE is_exact
        OR NOT EXISTS (SELECT FROM {schema}.marketplace_jobs AS job
                        WHERE job.completed_at < day.starts_at AND isfinite(job.completed_at)
                          AND job.status::text IN {finished})
           AND EXISTS (SELECT FROM {schema}.marketplace_job_stats WHERE date < falling.date AND total_jobs > 0)
        OR 2 * (SELECT count(*) FROM {schema}.marketplace_job_facts
                 WHERE date = falling.date AND deleted_at IS NULL AND status IN {ran})
           < (SELECT sum(total_jobs) FROM {schema}.marketplace_job_stats WHERE date = falling.date)""",
    counted=_COUNTED,
    finished=FINISHED,
    ran=RAN,
    falls=_FALLS,
)
"""Of these days, whose numbers no facts account for, those that must stay as they are: a number would fall, and it was
exact, or the source is not evidently complete. `starts`: when each of the days begins."""

_ENTRY = (
    "date",
    "outcome",
    "time_zone",
    "job_count",
    "task_count",
    "stored_job_count",
    "stored_task_count",
    "unknown_marketplace_count",
    "bad_duration_count",
    "run_id",
    "changed_at",
    "definition",
    "no_start_count",
    "row_count",
    "row_versions",
)
_ASSIGNMENTS = ", ".join(f"{name} = excluded.{name}" for name in _ENTRY if name != "date")

ENTER_EMPTY = Statement(
    """
    INSERT INTO {schema}.marketplace_job_stats_days ({columns})
    SELECT date, outcome, %(time_zone)s, 0, 0, 0, 0, unknown_marketplace, 0, %(run_id)s, now(), definition, 0, 0, NULL
      FROM unnest(%(days)s::date[], %(outcomes)s::text[], %(definitions)s::smallint[],
                  %(unknown_marketplace)s::integer[]) AS day (date, outcome, definition, unknown_marketplace)
     WHERE NOT EXISTS (SELECT FROM {schema}.marketplace_job_facts AS fact WHERE fact.date = ANY (%(days)s::date[]))
        ON CONFLICT (date) DO UPDATE SET {assignments}
    RETURNING date""",
    columns=", ".join(_ENTRY),
    assignments=_ASSIGNMENTS,
)
"""Enters days of which no row is stored, if none of them has facts; else it does nothing, and returns no row. For most
tenants that is all there is to do on most days. Parameters: those of ENTER."""

ENTER = Statement(
    """
    WITH stored AS (
        SELECT date, marketplace::text AS marketplace, action_type_id::bigint AS action_type_id,
               count(*)::integer AS row_count, sum(xmin::text::bigint)::bigint AS row_versions, {sums}
          FROM {schema}.marketplace_job_stats
         WHERE date = ANY (%(days)s::date[])
         GROUP BY GROUPING SETS ((date), (marketplace, action_type_id))
    ), counted AS (
        SELECT date, count(*)::integer AS job_count, {fact_sums}
          FROM {schema}.marketplace_job_facts WHERE date = ANY (%(days)s::date[]) GROUP BY date
    ), entry AS (
        SELECT day.date, outcome, %(time_zone)s::text AS time_zone, coalesce(counted.job_count, 0) AS job_count,
               coalesce(counted.{tasks}, 0) AS task_count,
               coalesce(stored.{jobs}, 0) + coalesce(stored.{cancelled}, 0) + coalesce(stored.{expired}, 0)
                   AS stored_job_count,
               coalesce(stored.{tasks}, 0) AS stored_task_count, unknown_marketplace AS unknown_marketplace_count,
               bad_duration AS bad_duration_count, %(run_id)s::text AS run_id, now() AS changed_at, definition,
               no_start AS no_start_count, coalesce(stored.row_count, 0) AS row_count, stored.row_versions
          FROM unnest(%(days)s::date[], %(outcomes)s::text[], %(definitions)s::smallint[],
                      %(unknown_marketplace)s::integer[], %(no_start)s::integer[], %(bad_duration)s::integer[])
                   AS day (date, outcome, definition, unknown_marketplace, no_start, bad_duration)
          LEFT JOIN stored ON stored.date = day.date
          LEFT JOIN counted ON counted.date = day.date
    ), entered AS (
        INSERT INTO {schema}.marketplace_job_stats_days AS ledger ({columns})
        SELECT {columns} FROM entry
            ON CONFLICT (date) DO UPDATE SET {assignments}
         WHERE ({compared}) IS DISTINCT FROM ({excluded})
    )
    SELECT coalesce(entry.date, stored.date)::date, stored.marketplace, stored.action_type_id, stored.row_count,
           stored.sums, entry.job_count,
           (outcome = 'computed' OR outcome = 'open' AND definition > 1) AND stored.sums IS DISTINCT FROM counted.sums,
           counted.sums
      FROM entry
      LEFT JOIN counted ON counted.date = entry.date
      FULL JOIN stored ON stored.date = entry.date""",
    sums=_SUMS,
    **{
        name: f"sums[{COUNTS.index(column) + 1}]"
        for name, column in (
            ("jobs", "total_jobs"),
            ("cancelled", "cancelled_count"),
            ("expired", "expired_count"),
            ("tasks", "total_tasks"),
        )
    },
    fact_sums="ARRAY[{}]::bigint[] AS sums".format(
        ", ".join(
            [
                f"count(*) FILTER (WHERE status IN {RAN})",
                "count(*) FILTER (WHERE status = 'completed')",
                "count(*) FILTER (WHERE status = 'failed')",
                "count(*) FILTER (WHERE status = 'cancelled')",
                "count(*) FILTER (WHERE status = 'expired')",
                f"coalesce(sum(retry_count) FILTER (WHERE status IN {RAN}), 0)",
                "count(duration_ms)",
                "coalesce(sum(duration_ms), 0)",
                f"count(wait_ms) FILTER (WHERE status IN {RAN})",
                f"coalesce(sum(wait_ms) FILTER (WHERE status IN {RAN}), 0)",
                f"sum(CASE WHEN status IN {RAN} THEN task_success_count + task_failure_count "
                "ELSE 0 * (task_success_count + task_failure_count) END)",
                *map(_tasks, ("task_success_count", "task_failure_count", "task_retry_count")),
            ]
        )
    ),
    columns=", ".join(_ENTRY),
    assignments=_ASSIGNMENTS,
    compared=", ".join(f"ledger.{name}" for name in _ENTRY if name not in ("date", "run_id", "changed_at")),
    excluded=", ".join(f"excluded.{name}" for name in _ENTRY if name not in ("date", "run_id", "changed_at")),
)
"""Enters these days into the ledger, with what is stored of them, and returns it as STORED does: a row per date, and a
row per marketplace and action type, without a date. The proof comes with each date: whether its stored sums differ
from those of its facts, and the latter.

Parameters, arrays beside `days`: `outcomes`, `definitions`, `unknown_marketplace`, `no_start`, `bad_duration`; and
`time_zone`, `run_id`.
"""

SPOIL = Statement("""
    UPDATE {schema}.marketplace_job_stats_days SET definition = 1
     WHERE date = ANY (%(days)s::date[]) AND definition <> 1""")
"""Says of days whose facts changed though they do not account for their numbers that they have to be judged again."""

DROP_ROWS = Statement("DELETE FROM {schema}.marketplace_job_stats WHERE date = ANY (%(days)s::date[])")
DROP_ENTRIES = Statement("DELETE FROM {schema}.marketplace_job_stats_days WHERE date = ANY (%(days)s::date[])")
"""Open days of another reporting zone go with their entries in the ledger."""

NO_END = Statement(
    """
    SELECT marketplace::text, action_type_id::bigint, count(*)
      FROM {schema}.marketplace_jobs
     WHERE status::text IN {finished} AND isfinite(completed_at) IS NOT TRUE
     GROUP BY marketplace::text, action_type_id""",
    finished=FINISHED,
)
"""How many finished jobs have no end that is a time, and so no day. Reads the whole table."""
