"""The facts of a window, brought in line with the source: two statements, of which the second is for the few jobs that
have changed, moved or vanished.

Parameters of all: those of `Window.parameters`, `allow_shrink`, and `is_new`: the ledger has no day of the window.
"""

from functools import lru_cache

from assets.marketplace_job_stats.reasons import failure_reason
from assets.marketplace_job_stats.statement import Statement
from models import MARKETPLACES

RAN = "('completed', 'failed')"
FINISHED = "('completed', 'failed', 'cancelled', 'expired')"
KNOWN = str(MARKETPLACES)

TASK_NUMBERS = ("task_count", "task_success_count", "task_failure_count", "task_retry_count")
COLUMNS = (
    "job_id",
    "created_at",
    "completed_at",
    "date",
    "action_type_id",
    "marketplace",
    "status",
    "retry_count",
    "duration_ms",
    "wait_ms",
    "failure_reason",
    *TASK_NUMBERS,
)
"""The columns of a fact, but for `deleted_at`."""


def _milliseconds(start: str, end: str) -> str:
    """From one instant to another in whole milliseconds; null if they are not in order, infinite or 2^31 ms away.

    The longest time is the one that still rounds to less than 2^31 ms. The comparison refuses what is null or infinite
    before anything is subtracted: PostgreSQL 16 and older cannot subtract infinities. A double holds the microseconds
    of such a time exactly, and is faster than the numeric that EXTRACT returns.
    """
    microseconds = f"(date_part('epoch', {end} - {start}) * 1000000)::bigint"
    return (
        f"CASE WHEN {start} <= {end} AND {start} > {end} - interval '2147483647.5 ms' "
        f"THEN (({microseconds} + 500) / 1000)::integer END"
    )


# An id that no integer holds is no action's, so it may as well be another one that is none.
_ACTION = "least(greatest(job.action_type_id, -2147483648), 2147483647)::integer"

# The finished jobs, as facts. `uncounted`: why one is not counted, or not wholly. The message is read by the job's key,
# so that an index over the other columns is enough for all jobs that have not failed.
_SOURCE = """
    SELECT job.id::bigint AS job_id, job.created_at, job.completed_at,
           (%(dates)s::date[])[width_bucket(job.completed_at, %(starts)s::timestamptz[])] AS date,
           {action} AS action_type_id, job.marketplace::text AS marketplace, job.status::text AS status,
           coalesce(job.retry_count, 0) AS retry_count,
           CASE WHEN job.status::text IN {ran} THEN {duration} END AS duration_ms,
           {wait} AS wait_ms,
           CASE WHEN job.status::text = 'failed' THEN {reason} END AS failure_reason,
           {task_columns},
           CASE WHEN job.marketplace::text NOT IN {known} THEN 'unknown_marketplace'
                WHEN job.status::text NOT IN {ran} THEN NULL
                WHEN job.started_at IS NULL THEN 'no_start'
                WHEN {duration} IS NULL THEN 'bad_duration' END AS uncounted
      FROM {{schema}}.marketplace_jobs AS job {tasks}
     WHERE job.status::text IN {finished} AND {chosen}"""

# With the table named at each column: one that it lacks would be taken from the job.
_TASK_STATUS = "marketplace_tasks.status::text"
_TASK_SUMS = f"""count(*)::integer AS task_count,
               (count(*) FILTER (WHERE {_TASK_STATUS} = 'success'))::integer AS task_success_count,
               (count(*) FILTER (WHERE {_TASK_STATUS} IN ('failed', 'timeout')))::integer AS task_failure_count,
               coalesce(sum(marketplace_tasks.retry_count)
                            FILTER (WHERE {_TASK_STATUS} IN ('success', 'failed', 'timeout')), 0) AS task_retry_count"""
_TASKS = {
    # For a long window all tasks are read once; for a few jobs theirs are looked up.
    "scan": f"""
      LEFT JOIN (SELECT marketplace_tasks.job_id, {_TASK_SUMS}
                   FROM {{schema}}.marketplace_tasks GROUP BY marketplace_tasks.job_id) AS task
             ON task.job_id = job.id AND job.status::text IN {RAN}""",
    "lookup": f"""
      LEFT JOIN LATERAL (SELECT {_TASK_SUMS}
                           FROM {{schema}}.marketplace_tasks
                          WHERE marketplace_tasks.job_id = job.id AND job.status::text IN {RAN}) AS task ON true""",
    "none": "",
}


def _source(tasks: str, chosen: str, reasons: bool) -> str:
    reason = "NULL::text"
    if reasons:
        message = failure_reason("failed.error_message")
        reason = (
            f"(SELECT {message} FROM {{schema}}.marketplace_jobs AS failed "
            "WHERE failed.id = job.id AND failed.created_at = job.created_at)"
        )
    numbers = {name: "bigint" if name == "task_retry_count" else "integer" for name in TASK_NUMBERS}
    task_columns = ", ".join(
        f"NULL::{type_} AS {name}" if tasks == "none" else f"coalesce(task.{name}, 0)::{type_} AS {name}"
        for name, type_ in numbers.items()
    )
    return _SOURCE.format(
        action=_ACTION,
        ran=RAN,
        known=KNOWN,
        finished=FINISHED,
        duration=_milliseconds("job.started_at", "job.completed_at"),
        wait=_milliseconds("job.created_at", "job.started_at"),
        reason=reason,
        task_columns=task_columns,
        tasks=_TASKS[tasks],
        chosen=chosen,
    )


def _keeps_tasks(tasks: str) -> str:
    """Whether a job keeps the task numbers of its fact: some of its task rows are gone, or the whole table is."""
    if tasks == "none":
        return "NOT %(allow_shrink)s::boolean"
    return (
        f"NOT %(allow_shrink)s::boolean AND source.status IN {RAN} AND source.task_count < coalesce(fact.task_count, 0)"
    )


# Whether the source holds the job of a fact. Here and below, a scalar with a limit is looked up one by one, where for
# EXISTS the whole table might be read.
_IS_THERE = """(SELECT true FROM {schema}.marketplace_jobs AS job
                             WHERE job.id = fact.job_id AND job.created_at = fact.created_at LIMIT 1)"""


def _has_more_tasks(tasks: str) -> str:
    """Whether a job that is there loses task numbers if they do not stay."""
    if tasks == "none":
        return "source.job_id IS NOT NULL AND fact.task_count IS NOT NULL"
    return f"source.status IN {RAN} AND source.task_count < fact.task_count"


_IN_WINDOW = "job.completed_at >= %(window_start)s::timestamptz AND job.completed_at < %(window_end)s::timestamptz"

_COMPARED = tuple(name for name in COLUMNS if name not in ("job_id", "created_at", *TASK_NUMBERS))
_DIFFERS = " OR ".join(f"fact.{name} IS DISTINCT FROM source.{name}" for name in _COMPARED)
_TASKS_DIFFER = " OR ".join(f"fact.{name} IS DISTINCT FROM source.{name}" for name in TASK_NUMBERS)


@lru_cache
def compare(tasks: str, reasons: bool) -> Statement:
    """Compares the facts of the window with the source; jobs without a fact get one. Returns rows of several kinds:

    `late`, how many jobs are new to the facts, by date, action type and marketplace, or with `is_new` by date only;
    `uncounted`, how many are not counted, or not wholly, by reason, date, action type and marketplace;
    and one row `others` with the ids of the jobs that need more (see `change`).

    OFFSET 0 keeps the planner from writing the expressions of a subquery out wherever its columns are used.
    """
    return Statement(
        """
        WITH difference AS MATERIALIZED (
            SELECT * FROM (
                SELECT source.*, fact.job_id AS fact_id,
                       CASE WHEN source.job_id IS NULL
                            THEN CASE WHEN fact.deleted_at IS NULL OR %(allow_shrink)s::boolean OR {is_there}
                                      THEN 'other' END
                            WHEN fact.job_id IS NULL THEN
                                 CASE WHEN source.marketplace IN {known} THEN 'new'
                                      WHEN (SELECT true FROM {schema}.marketplace_job_facts AS elsewhere
                                             WHERE elsewhere.job_id = source.job_id
                                               AND elsewhere.created_at = source.created_at LIMIT 1) THEN 'other' END
                            WHEN source.marketplace NOT IN {known} OR fact.deleted_at IS NOT NULL OR {differs}
                                 OR (NOT ({keeps_tasks}) AND ({tasks_differ})) THEN 'other' END AS change
                  FROM ({source} OFFSET 0) AS source
                  FULL JOIN (SELECT * FROM {schema}.marketplace_job_facts
                              WHERE date BETWEEN %(first_date)s::date AND %(last_date)s::date) AS fact
                         ON fact.job_id = source.job_id AND fact.created_at = source.created_at
                OFFSET 0) AS compared
             WHERE change IS NOT NULL OR uncounted IS NOT NULL
        ), written AS (
            INSERT INTO {schema}.marketplace_job_facts ({columns})
            SELECT {columns} FROM difference WHERE change = 'new'
                ON CONFLICT (job_id, created_at) DO NOTHING
            RETURNING date, action_type_id, marketplace
        )
        SELECT 'late' AS kind, date, action_type_id, marketplace, count(*) AS job_count, NULL::bigint[] AS ids
          FROM (SELECT date, CASE WHEN NOT %(is_new)s::boolean THEN action_type_id::bigint END AS action_type_id,
                       CASE WHEN NOT %(is_new)s::boolean THEN marketplace END AS marketplace
                  FROM written) AS late
         GROUP BY date, action_type_id, marketplace
        UNION ALL
        SELECT uncounted, date, action_type_id::bigint, marketplace, count(*), NULL
          FROM difference
         WHERE uncounted IS NOT NULL
         GROUP BY uncounted, date, action_type_id, marketplace
        UNION ALL
        SELECT 'others', NULL, NULL, NULL, count(*) FILTER (WHERE change = 'new'),
               array_agg(coalesce(job_id, fact_id)) FILTER (
                   WHERE change = 'other'
                      OR change = 'new' AND inserted.number < new.number)
          FROM difference
         CROSS JOIN (SELECT count(*) AS number FROM written) AS inserted
         CROSS JOIN (SELECT count(*) AS number FROM difference WHERE change = 'new') AS new""",
        source=_source(tasks, _IN_WINDOW, reasons),
        is_there=_IS_THERE,
        columns=", ".join(COLUMNS),
        known=KNOWN,
        differs=_DIFFERS,
        keeps_tasks=_keeps_tasks(tasks),
        tasks_differ=_TASKS_DIFFER,
    )


_HAS_DAY = "job.completed_at BETWEEN '0001-01-03' AND '9999-12-29'"
"""Beyond, no calendar of ours reaches."""

ENDS = Statement(
    """
    SELECT DISTINCT completed_at
      FROM {schema}.marketplace_jobs AS job
     WHERE id = ANY (%(ids)s::bigint[]) AND status::text IN {finished} AND {has_day}""",
    finished=FINISHED,
    has_day=_HAS_DAY,
)
"""When these jobs ended, wherever they are now."""


@lru_cache
def change(tasks: str, reasons: bool) -> Statement:
    """For the jobs with these `ids` that are in the window, or whose facts are: makes the facts what the jobs are.

    A job that has moved takes its fact along; one that is there but no longer finished, or of no known marketplace,
    loses it; one that is gone keeps it, marked, or loses it with `allow_shrink`. Where there are fewer task rows than a
    fact remembers, its task numbers stay.

    The dates and starts given have the days on which these jobs ended; `first_date` and `last_date` are those of the
    window. Returns, by date, action type and marketplace, how many were corrected, of these how many lost their fact,
    how many moved in, moved out and were forgotten, and whether jobs or tasks were.
    """
    by_id = f"job.id = ANY (%(ids)s::bigint[]) AND {_HAS_DAY}"
    names = [name for name in COLUMNS if name not in ("job_id", "created_at")]
    return Statement(
        """
        WITH source AS MATERIALIZED ({source} AND job.marketplace::text IN {known}
        ), joined AS MATERIALIZED (
            SELECT source.*, fact.job_id AS fact_id, fact.created_at AS fact_created_at, fact.date AS fact_date,
                   fact.action_type_id AS fact_action_type_id, fact.marketplace AS fact_marketplace,
                   {keeps_tasks} AS keeps_tasks,
                   {has_more_tasks} AS has_more_tasks,
                   {differs} OR (NOT ({keeps_tasks}) AND ({tasks_differ})) AS differs,
                   source.job_id IS NULL AND {is_there} IS NULL AS is_gone
              FROM {schema}.marketplace_job_facts AS fact
              LEFT JOIN source ON source.job_id = fact.job_id AND source.created_at = fact.created_at
             WHERE fact.job_id = ANY (%(ids)s::bigint[])
               AND (fact.date BETWEEN %(first_date)s::date AND %(last_date)s::date
                    OR (SELECT true FROM {schema}.marketplace_jobs AS job
                         WHERE job.id = fact.job_id AND job.created_at = fact.created_at
                           AND job.status::text IN {finished} AND {in_window} LIMIT 1))
        ), updated AS (
            UPDATE {schema}.marketplace_job_facts AS fact
               SET {assignments}, deleted_at = NULL
              FROM joined
             WHERE joined.job_id IS NOT NULL AND (joined.differs OR fact.deleted_at IS NOT NULL)
               AND fact.job_id = fact_id AND fact.created_at = fact_created_at
        ), marked AS (
            UPDATE {schema}.marketplace_job_facts AS fact
               SET deleted_at = now()
              FROM joined
             WHERE is_gone AND NOT %(allow_shrink)s::boolean AND fact.deleted_at IS NULL
               AND fact.job_id = fact_id AND fact.created_at = fact_created_at
        ), removed AS (
            DELETE FROM {schema}.marketplace_job_facts AS fact
             USING joined
             WHERE joined.job_id IS NULL AND (NOT is_gone OR %(allow_shrink)s::boolean)
               AND fact.job_id = fact_id AND fact.created_at = fact_created_at
        )
        SELECT side.date, side.action_type_id::bigint, side.marketplace,
               count(*) FILTER (WHERE what = 'corrected') AS corrected,
               count(*) FILTER (WHERE what = 'corrected' AND job_id IS NULL) AS removed,
               count(*) FILTER (WHERE what = 'moved' AND is_new) AS moved_in,
               count(*) FILTER (WHERE what = 'moved' AND NOT is_new) AS moved_out,
               count(*) FILTER (WHERE what = 'forgotten') AS forgotten,
               coalesce(bool_or(what = 'forgotten' OR %(allow_shrink)s::boolean AND has_more_tasks), false)
          FROM joined
         CROSS JOIN LATERAL (VALUES (
               CASE WHEN is_gone THEN CASE WHEN %(allow_shrink)s::boolean THEN 'forgotten' END
                    WHEN job_id IS NULL THEN 'corrected'
                    WHEN (date, action_type_id, marketplace)
                         IS DISTINCT FROM (fact_date, fact_action_type_id, fact_marketplace) THEN 'moved'
                    WHEN differs THEN 'corrected' END)) AS happened (what)
         CROSS JOIN LATERAL (VALUES (true, date, action_type_id, marketplace),
                                    (false, fact_date, fact_action_type_id, fact_marketplace))
                 AS side (is_new, date, action_type_id, marketplace)
         WHERE what IS NOT NULL AND CASE WHEN job_id IS NULL THEN NOT is_new ELSE is_new OR what = 'moved' END
         GROUP BY side.date, side.action_type_id, side.marketplace""",
        source=_source(tasks, by_id, reasons),
        is_there=_IS_THERE,
        known=KNOWN,
        finished=FINISHED,
        in_window=_IN_WINDOW,
        has_more_tasks=_has_more_tasks(tasks),
        keeps_tasks=_keeps_tasks(tasks),
        differs=_DIFFERS,
        tasks_differ=_TASKS_DIFFER,
        assignments=", ".join(
            f"{name} = CASE WHEN keeps_tasks THEN fact.{name} ELSE joined.{name} END"
            if name in TASK_NUMBERS
            else f"{name} = joined.{name}"
            for name in names
        ),
    )


REDATE = Statement("""
    UPDATE {schema}.marketplace_job_facts
       SET date = (%(dates)s::date[])[width_bucket(completed_at, %(starts)s::timestamptz[])]
     WHERE completed_at >= (%(starts)s::timestamptz[])[1]
       AND date <> (%(dates)s::date[])[width_bucket(completed_at, %(starts)s::timestamptz[])]""")
"""Where the reporting zone has changed, the facts get their days again, those of jobs that are gone among them."""

COUNTS = Statement("""
    SELECT date, count(*) FROM {schema}.marketplace_job_facts WHERE date = ANY (%(days)s::date[]) GROUP BY date""")
"""How many facts each of these days has."""
