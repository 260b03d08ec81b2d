"""The cases of the campaign: what is odd about a database, for `tests.faults.campaign`.

The tenant that is made odd is user_2, of user_1, user_2 and user_10. Statements are the owner's, before the migration or
between it and the run; `ROOT` makes them a superuser's.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ROOT, AGAIN = "RESET ROLE; ", "; SET ROLE owner"
JOBS, TASKS, STATS = "user_2.marketplace_jobs", "user_2.marketplace_tasks", "user_2.marketplace_job_stats"
LEDGER, FACTS = "user_2.marketplace_job_stats_days", "user_2.marketplace_job_facts"
ACTIONS, SUMMARY = "public.marketplace_action_types", "marketplace_stats.marketplace_daily_summary"


@dataclass(frozen=True)
class Case:
    """What is odd: settings of both roles, a pooler, more of the URL, statements, and locks that others hold."""

    name: str
    before: Sequence[str] = ()
    after: Sequence[str] = ()
    settings: Mapping[str, str] = field(default_factory=dict)
    pooler: Mapping[str, str] = field(default_factory=dict)
    url: str = ""
    hold: Sequence[str] = ()
    hold_migration: bool = False

    @property
    def begins_migrated(self) -> bool:
        """Whether nothing is odd before the run; the migration then comes last, as what may repair it."""
        return not (self.before or self.settings or self.pooler or self.url or self.hold_migration)

    @property
    def commands(self) -> tuple[str, ...]:
        """In their order. The report takes longest and reads the summary alone, so it is left out where only tenants are odd."""
        is_about_all = self.settings or self.pooler or self.url or "summary" in self.name or "codes" in self.name
        work = ("run", "summary", *(["report"] if is_about_all else []), "stats", "stats user_2")
        return (*work, "migration") if self.begins_migrated else ("migration", *work)


def setting(name: str, value: str, **others: str) -> Case:
    return Case(f"{name} = {value}", settings={name: value, **others})


def before(name: str, *statements: str) -> Case:
    return Case(name, before=statements)


def after(name: str, *statements: str) -> Case:
    return Case(name, after=statements)


def column(change: str, table: str = JOBS) -> Case:
    """An altered column of a source."""
    return Case(f"{table.partition('.')[2]}: {change}", before=(f"ALTER TABLE {table} {change}",))


NOTHING = (
    *("enable_hashjoin", "enable_mergejoin", "enable_seqscan", "enable_indexscan", "enable_sort", "enable_hashagg"),
    *("enable_bitmapscan", "enable_indexonlyscan", "enable_material", "enable_memoize"),
)
MOVED = "SELECT * FROM user_2.kept"

SETTINGS = (
    Case("nothing odd"),
    setting("default_transaction_read_only", "on"),
    setting("search_path", "user_2, public"),
    setting("search_path", ""),
    setting("DateStyle", "German, DMY"),
    setting("DateStyle", "SQL, MDY"),
    setting("IntervalStyle", "sql_standard"),
    setting("IntervalStyle", "iso_8601"),
    setting("extra_float_digits", "-15"),
    setting("bytea_output", "escape"),
    setting("standard_conforming_strings", "off", escape_string_warning="off"),
    setting("backslash_quote", "off"),
    setting("timezone", "America/Havana"),
    setting("timezone", "Asia/Kathmandu"),
    setting("lc_numeric", "de_DE.UTF-8"),
    setting("lc_messages", "C", lc_time="C", lc_monetary="C"),
    setting("row_security", "off"),
    setting("statement_timeout", "1"),
    setting("lock_timeout", "1"),
    setting("idle_in_transaction_session_timeout", "1"),
    setting("idle_session_timeout", "1"),
    setting("transaction_timeout", "1"),
    setting("default_transaction_isolation", "serializable"),
    setting("default_transaction_isolation", "read uncommitted"),
    setting("default_transaction_deferrable", "on", default_transaction_isolation="serializable"),
    setting("session_replication_role", "replica"),
    Case("enable_*: all off", settings=dict.fromkeys(NOTHING, "off")),
    setting("jit", "on", jit_above_cost="0", jit_optimize_above_cost="0", jit_inline_above_cost="0"),
    setting("work_mem", "64kB"),
    setting("temp_file_limit", "0", work_mem="64kB"),
    setting("maintenance_work_mem", "1MB", temp_buffers="800kB"),
    setting("default_tablespace", "pg_global"),
    setting("array_nulls", "off"),
    setting("quote_all_identifiers", "on"),
    setting("transform_null_equals", "on"),
    setting("plan_cache_mode", "force_generic_plan"),
    setting("join_collapse_limit", "1", from_collapse_limit="1", geqo_threshold="2"),
    setting("constraint_exclusion", "on"),
    setting("client_min_messages", "debug5"),
    setting("client_encoding", "LATIN1"),
    setting("client_encoding", "SQL_ASCII"),
    setting("synchronous_commit", "off"),
    setting("check_function_bodies", "off", exit_on_error="on"),
    setting("debug_parallel_query", "regress", max_parallel_workers_per_gather="2"),
    setting("parallel_setup_cost", "0", parallel_tuple_cost="0", min_parallel_table_scan_size="0"),
    setting("role", "other"),
    setting("restrict_nonsystem_relation_kind", "view, foreign-table"),
    setting("default_toast_compression", "pglz", default_statistics_target="1"),
    setting("zero_damaged_pages", "on", ignore_checksum_failure="on"),
    setting("xmlbinary", "hex", xmloption="document"),
    setting("application_name", "another's"),
    setting("event_triggers", "off"),
)
POOLERS = (
    Case("PgBouncer, session", pooler={"mode": "session"}),
    Case("PgBouncer, session, ignores options", pooler={"mode": "session", "ignore_startup_parameters": "options"}),
    Case(
        "PgBouncer, session, options in the URL that it drops",
        pooler={"mode": "session", "ignore_startup_parameters": "options"},
        url="&options=-c%20statement_timeout%3D1",
    ),
    Case("PgBouncer, session, options in the URL", pooler={"mode": "session"}, url="&options=-c%20work_mem%3D1MB"),
    Case("PgBouncer, session, no reset", pooler={"mode": "session", "server_reset_query": ""}),
    Case(
        "PgBouncer, session, two connections",
        pooler={"mode": "session", "default_pool_size": "2", "query_wait_timeout": "5"},
    ),
    Case(
        "PgBouncer, session, one connection",
        pooler={"mode": "session", "default_pool_size": "1", "query_wait_timeout": "5"},
    ),
    Case("PgBouncer, transaction", pooler={"mode": "transaction"}),
    Case("PgBouncer, transaction, one connection", pooler={"mode": "transaction", "default_pool_size": "1"}),
    Case("PgBouncer, statement", pooler={"mode": "statement"}),
    Case(
        "PgBouncer, session, query_timeout",
        pooler={"mode": "session", "query_timeout": "1", "idle_transaction_timeout": "1"},
    ),
    Case("URL: target_session_attrs=standby", url="&target_session_attrs=standby"),
    Case("URL: target_session_attrs=read-only", url="&target_session_attrs=read-only"),
    Case("URL: statement_timeout in options", url="&options=-c%20statement_timeout%3D1"),
    Case(
        "URL: search_path and read only in options", url="&options=-c%20search_path%3Duser_2%20-c%20row_security%3Doff"
    ),
    Case("URL: client_encoding", url="&client_encoding=LATIN1"),
    Case("URL: default_transaction_read_only", url="&options=-c%20default_transaction_read_only%3Don"),
)
SOURCES = (
    before("jobs are a view", f"ALTER TABLE {JOBS} RENAME TO kept", f"CREATE VIEW {JOBS} AS {MOVED}"),
    before(
        "jobs are a view with security_invoker",
        f"ALTER TABLE {JOBS} RENAME TO kept",
        f"CREATE VIEW {JOBS} WITH (security_invoker) AS {MOVED}",
    ),
    before(
        "jobs are a materialized view",
        f"ALTER TABLE {JOBS} RENAME TO kept",
        f"CREATE MATERIALIZED VIEW {JOBS} AS {MOVED}",
    ),
    before("tasks are a view", f"ALTER TABLE {TASKS} RENAME TO kept", f"CREATE VIEW {TASKS} AS {MOVED}"),
    before(
        "tasks are a materialized view",
        f"ALTER TABLE {TASKS} RENAME TO kept",
        f"CREATE MATERIALIZED VIEW {TASKS} AS {MOVED}",
    ),
    before(
        "jobs are partitioned",
        f"ALTER TABLE {JOBS} RENAME TO kept",
        f"CREATE TABLE {JOBS} (LIKE user_2.kept) PARTITION BY HASH (id)",
        f"CREATE TABLE user_2.p0 PARTITION OF {JOBS} FOR VALUES WITH (MODULUS 2, REMAINDER 0)",
        f"CREATE TABLE user_2.p1 PARTITION OF {JOBS} FOR VALUES WITH (MODULUS 2, REMAINDER 1)",
        f"INSERT INTO {JOBS} {MOVED}",
    ),
    before(
        "jobs are partitioned, one partition is detached",
        f"ALTER TABLE {JOBS} RENAME TO kept",
        f"CREATE TABLE {JOBS} (LIKE user_2.kept) PARTITION BY LIST (marketplace)",
        f"CREATE TABLE user_2.p0 PARTITION OF {JOBS} FOR VALUES IN ('vinted', 'ebay')",
        f"CREATE TABLE user_2.p1 PARTITION OF {JOBS} FOR VALUES IN ('etsy')",
        f"INSERT INTO {JOBS} {MOVED}",
        f"ALTER TABLE {JOBS} DETACH PARTITION user_2.p1",
    ),
    before(
        "jobs are a foreign table",
        ROOT
        + "CREATE FOREIGN DATA WRAPPER nowhere; CREATE SERVER s FOREIGN DATA WRAPPER nowhere; "
        + "GRANT USAGE ON FOREIGN SERVER s TO owner"
        + AGAIN,
        f"ALTER TABLE {JOBS} RENAME TO kept",
        f"CREATE FOREIGN TABLE {JOBS} (id int, marketplace text, action_type_id int, status text, retry_count int, "
        "error_message text, started_at timestamptz, completed_at timestamptz, created_at timestamptz) SERVER s",
    ),
    before(
        "jobs are inherited from",
        f"CREATE TABLE user_2.child () INHERITS ({JOBS})",
        f"INSERT INTO user_2.child {MOVED.replace('user_2.kept', f'ONLY {JOBS}')} LIMIT 0",
        f"WITH moved AS (DELETE FROM ONLY {JOBS} WHERE id < 20 RETURNING *) INSERT INTO user_2.child SELECT * FROM moved",
    ),
    before("jobs are a sequence", f"DROP TABLE {JOBS}", f"CREATE SEQUENCE {JOBS}"),
    before("jobs are a type", f"DROP TABLE {JOBS}", f"CREATE TYPE {JOBS} AS (id int)"),
    before("jobs are unlogged", f"ALTER TABLE {JOBS} SET UNLOGGED"),
    before("jobs have row security without a policy", f"ALTER TABLE {JOBS} ENABLE ROW LEVEL SECURITY"),
    before(
        "jobs have a policy that hides some",
        f"ALTER TABLE {JOBS} ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY p ON {JOBS} USING (marketplace = 'vinted')",
    ),
    before(
        "tasks have a policy that hides some, forced",
        f"ALTER TABLE {TASKS} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY p ON {TASKS} USING (job_id % 2 = 0)",
    ),
    before(
        "a view over jobs with a policy",
        f"ALTER TABLE {JOBS} RENAME TO kept",
        "ALTER TABLE user_2.kept ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY",
        "CREATE POLICY p ON user_2.kept USING (marketplace = 'vinted')",
        f"CREATE VIEW {JOBS} AS {MOVED}",
    ),
    column("DROP COLUMN completed_at"),
    column("DROP COLUMN created_at"),
    column("DROP COLUMN started_at"),
    column("DROP COLUMN retry_count"),
    column("DROP COLUMN error_message"),
    column("DROP COLUMN marketplace"),
    column("DROP COLUMN status"),
    column("DROP COLUMN priority"),
    column("DROP COLUMN job_id", TASKS),
    column("DROP COLUMN status", TASKS),
    column("DROP COLUMN retry_count", TASKS),
    column("DROP COLUMN id", TASKS),
    before("tasks: no table", f"DROP TABLE {TASKS}"),
    before(
        "tasks: no table anywhere",
        *(f"DROP TABLE {s}.marketplace_tasks" for s in ("user_1", "user_2", "user_10", "template_tenant")),
    ),
    before("jobs: no table", f"DROP TABLE {JOBS}"),
    after("jobs: dropped after the migration", f"DROP TABLE {JOBS} CASCADE"),
    column("ALTER completed_at TYPE timestamp"),
    column("ALTER started_at TYPE timestamp"),
    column("ALTER created_at TYPE timestamp"),
    column("ALTER completed_at TYPE text"),
    column("ALTER completed_at TYPE date"),
    column("ALTER completed_at TYPE timestamptz(0)"),
    column("ALTER completed_at TYPE bigint USING extract(epoch FROM completed_at)"),
    column("ALTER id TYPE bigint"),
    column("ALTER id DROP DEFAULT, ALTER id TYPE text"),
    column("ALTER id DROP DEFAULT, ALTER id TYPE uuid USING lpad(id::text, 32, '0')::uuid"),
    column("ALTER id TYPE numeric"),
    column("ALTER retry_count TYPE numeric USING retry_count + 0.5"),
    column("ALTER retry_count DROP NOT NULL, ALTER retry_count TYPE int USING nullif(retry_count, 1)"),
    column("ALTER retry_count TYPE bigint USING retry_count * 9999999999"),
    column("ALTER retry_count DROP DEFAULT, ALTER retry_count TYPE text"),
    column("ALTER status TYPE char(20)"),
    column("ALTER marketplace TYPE char(50)"),
    column("ALTER status TYPE text USING upper(status)"),
    column("ALTER status TYPE jsonb USING to_jsonb(status)"),
    column("ALTER status TYPE int USING length(status)"),
    column("ALTER action_type_id TYPE text"),
    column("ALTER action_type_id DROP NOT NULL, ALTER action_type_id TYPE int USING nullif(action_type_id, 1)"),
    column("ALTER action_type_id TYPE bigint USING action_type_id + 9999999999"),
    column(
        "ALTER created_at DROP NOT NULL, ALTER created_at TYPE timestamptz USING CASE WHEN id % 2 = 0 THEN created_at END"
    ),
    column("ALTER job_id TYPE bigint", TASKS),
    column("ALTER job_id TYPE text", TASKS),
    column("ALTER retry_count DROP NOT NULL, ALTER retry_count TYPE int USING nullif(retry_count, 1)", TASKS),
    column("DROP COLUMN retry_count, ADD retry_count int GENERATED ALWAYS AS (priority + 1) STORED"),
    column("DROP COLUMN retry_count, ADD retry_count int GENERATED ALWAYS AS (priority + 1) VIRTUAL"),
    column('ADD "a ""quoted""\nname" text, ADD "select" int, DROP COLUMN batch_job_id'),
    before(
        "jobs: domains",
        "CREATE DOMAIN user_2.word AS text CHECK (value <> ''); CREATE DOMAIN user_2.instant AS timestamptz; "
        "CREATE DOMAIN user_2.number AS int",
        f"ALTER TABLE {JOBS} ALTER status TYPE user_2.word, ALTER marketplace TYPE user_2.word, "
        "ALTER completed_at TYPE user_2.instant, ALTER id TYPE user_2.number",
    ),
    before(
        "jobs: an enum without completed",
        "CREATE TYPE user_2.jobstatus AS ENUM ('failed', 'cancelled', 'pending')",
        f"DELETE FROM {JOBS} WHERE status = 'completed'",
        f"ALTER TABLE {JOBS} ALTER status TYPE user_2.jobstatus USING status::text::user_2.jobstatus",
    ),
    before(
        "jobs: marketplace is an enum",
        "CREATE TYPE user_2.shop AS ENUM ('ebay', 'etsy', 'vinted')",
        f"ALTER TABLE {JOBS} ALTER marketplace TYPE user_2.shop USING marketplace::user_2.shop",
    ),
    before(
        "jobs: a collation that ignores case",
        "CREATE COLLATION user_2.loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
        f"ALTER TABLE {JOBS} ALTER status TYPE text COLLATE user_2.loose, ALTER marketplace TYPE text COLLATE user_2.loose",
        f"UPDATE {JOBS} SET status = upper(status), marketplace = upper(marketplace) WHERE id % 2 = 0",
    ),
    before(
        "jobs: huge texts",
        f"UPDATE {JOBS} SET error_message = repeat('x', 20000000) WHERE id < 4; UPDATE {JOBS} SET result_data = to_jsonb(repeat('y', 20000000)) WHERE id < 4",
    ),
    before(
        "jobs: the far past and future",
        f"UPDATE {JOBS} SET completed_at = '0044-03-15 BC' WHERE id = 1; UPDATE {JOBS} SET completed_at = '294275-01-01' WHERE id = 2; UPDATE {JOBS} SET started_at = '-infinity' WHERE id = 3; UPDATE {JOBS} SET created_at = 'infinity' WHERE id = 4; UPDATE {JOBS} SET completed_at = 'infinity' WHERE id = 5",
    ),
    before(
        "jobs: the same id twice",
        f"ALTER TABLE {JOBS} DROP CONSTRAINT marketplace_jobs_pkey; INSERT INTO {JOBS} SELECT * FROM {JOBS} WHERE id < 5",
    ),
    before(
        "jobs: the same id twice, created differently",
        f"ALTER TABLE {JOBS} DROP CONSTRAINT marketplace_jobs_pkey; INSERT INTO {JOBS} (id, marketplace, action_type_id, status, created_at, started_at, completed_at) SELECT id, marketplace, action_type_id, status, created_at - interval '1 h', started_at, completed_at FROM {JOBS} WHERE id < 5",
    ),
    before(
        "jobs: an unknown marketplace, an empty one",
        f"UPDATE {JOBS} SET marketplace = 'depop' WHERE id < 9; UPDATE {JOBS} SET marketplace = '' WHERE id IN (10, 12)",
    ),
    before(
        "jobs: an invalid index",
        f"CREATE INDEX odd ON {JOBS} (completed_at)",
        ROOT + "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'user_2.odd'::regclass" + AGAIN,
    ),
    before(
        "jobs: triggers and a rule",
        f"CREATE FUNCTION user_2.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$no$$; END'; CREATE TRIGGER t BEFORE UPDATE OR DELETE OR INSERT ON {JOBS} FOR EACH ROW EXECUTE FUNCTION user_2.f(); CREATE RULE r AS ON UPDATE TO {JOBS} DO INSTEAD NOTHING",
    ),
    before(
        "jobs: another tablespace",
        ROOT + "CREATE TABLESPACE elsewhere LOCATION ''" + AGAIN,
        ROOT + f"ALTER TABLE {JOBS} SET TABLESPACE elsewhere; GRANT CREATE ON TABLESPACE elsewhere TO owner" + AGAIN,
    ),
    before(
        "jobs: a prepared transaction holds a lock",
        f"BEGIN; LOCK TABLE {JOBS} IN ACCESS EXCLUSIVE MODE; PREPARE TRANSACTION 'held'",
    ),
    before(
        "functions and operators in the tenant's schema",
        "CREATE FUNCTION user_2.lower(varchar) RETURNS text LANGUAGE sql AS 'SELECT $$x$$'; CREATE FUNCTION user_2.eq(varchar, varchar) RETURNS bool LANGUAGE sql AS 'SELECT true'; CREATE OPERATOR user_2.= (LEFTARG = varchar, RIGHTARG = varchar, FUNCTION = user_2.eq); CREATE FUNCTION user_2.width_bucket(timestamptz, timestamptz[]) RETURNS int LANGUAGE sql AS 'SELECT 1'",
    ),
    before(
        "a cast between text and the status type",
        "CREATE FUNCTION user_2.f(user_1.jobstatus) RETURNS text LANGUAGE sql AS 'SELECT $$completed$$'",
        ROOT + "CREATE CAST (user_1.jobstatus AS text) WITH FUNCTION user_2.f(user_1.jobstatus) AS IMPLICIT" + AGAIN,
    ),
)
CATALOG = (
    before(
        "schemas that only look like tenants",
        'CREATE SCHEMA "User_3"; CREATE SCHEMA user_; CREATE SCHEMA user_3x; CREATE SCHEMA "user_3 "; CREATE SCHEMA "user_٣"',
    ),
    before("a tenant without any table", "CREATE SCHEMA user_3"),
    before(
        "a tenant with leading zeros and one far away",
        "CREATE SCHEMA user_02; CREATE SCHEMA user_99999999999999999999999999; CREATE TABLE user_02.marketplace_jobs (LIKE user_10.marketplace_jobs INCLUDING ALL)",
    ),
    before(
        "odd names beside the tables",
        'CREATE TABLE user_2."a ""b\nc; --" (x int); CREATE TABLE user_2."Marketplace_Jobs" (x int)',
    ),
    before(
        "codes and names with quotes, newlines and markup",
        f"UPDATE {ACTIONS} SET code = E'[/red]\\'\"\\n' || id, name = E'=1+1 <b>\\n' || name",
    ),
    before(
        "action types: a null code",
        f"ALTER TABLE {ACTIONS} ALTER code DROP NOT NULL; UPDATE {ACTIONS} SET code = NULL WHERE id = 1",
    ),
    before("action types: renamed", f"ALTER TABLE {ACTIONS} RENAME TO marketplace_actions"),
    before("action types: no column code", f"ALTER TABLE {ACTIONS} RENAME code TO label"),
    before("action types: no column name", f"ALTER TABLE {ACTIONS} DROP COLUMN name"),
    before("action types: ids are texts", f"ALTER TABLE {ACTIONS} ALTER id DROP DEFAULT, ALTER id TYPE text"),
    before(
        "action types: a view",
        f"ALTER TABLE {ACTIONS} RENAME TO kept; CREATE VIEW {ACTIONS} AS SELECT * FROM public.kept",
    ),
    before(
        "action types: the same id twice",
        f"ALTER TABLE {ACTIONS} DROP CONSTRAINT marketplace_action_types_pkey; INSERT INTO {ACTIONS} SELECT id, marketplace, code || '2', name FROM {ACTIONS} WHERE id = 1",
    ),
    before(
        "action types: row security",
        f"ALTER TABLE {ACTIONS} ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON {ACTIONS} USING (id > 4)",
    ),
    after("action types: revoked", f"REVOKE ALL ON {ACTIONS} FROM stats"),
    after("action types: dropped after the migration", f"DROP TABLE {ACTIONS}"),
    Case("action types: locked", hold=(f"LOCK TABLE {ACTIONS}",)),
    before(
        "the tenant's tables are somebody else's",
        ROOT + "CREATE ROLE stranger" + AGAIN,
        ROOT + f"ALTER TABLE user_2.vinted_job_stats OWNER TO stranger; ALTER TABLE {JOBS} OWNER TO stranger" + AGAIN,
    ),
    before("the tenant's schema is somebody else's", ROOT + "ALTER SCHEMA user_2 OWNER TO other" + AGAIN),
    after("jobs: SELECT revoked", f"REVOKE ALL ON {JOBS} FROM stats"),
    after(
        "jobs: SELECT on a column revoked",
        f"REVOKE ALL ON {JOBS} FROM stats; GRANT SELECT (id, status) ON {JOBS} TO stats",
    ),
    after("tasks: SELECT revoked", f"REVOKE ALL ON {TASKS} FROM stats"),
    after("schema: USAGE revoked", "REVOKE ALL ON SCHEMA user_2 FROM stats"),
    after("our tables: INSERT revoked", f"REVOKE INSERT ON {STATS} FROM stats"),
    after("our tables: SELECT revoked", f"REVOKE SELECT ON {STATS} FROM stats"),
    after("our tables: the ledger revoked", f"REVOKE ALL ON {LEDGER} FROM stats"),
    after("the summary: revoked", f"REVOKE ALL ON {SUMMARY} FROM stats"),
    after("our schema: revoked", "REVOKE ALL ON SCHEMA marketplace_stats FROM stats"),
    after("a tenant is dropped", "DROP SCHEMA user_2 CASCADE"),
    after("a tenant is renamed", "ALTER SCHEMA user_2 RENAME TO user_77"),
    after(
        "all tenants are dropped", "DROP SCHEMA user_1 CASCADE; DROP SCHEMA user_2 CASCADE; DROP SCHEMA user_10 CASCADE"
    ),
    Case("locked: jobs", hold=(f"LOCK TABLE {JOBS}",)),
    Case("locked: tasks", hold=(f"LOCK TABLE {TASKS}",)),
    Case("locked: our stats", hold=(f"LOCK TABLE {STATS}",)),
    Case("locked: our facts", hold=(f"LOCK TABLE {FACTS}",)),
    Case("locked: the ledger", hold=(f"LOCK TABLE {LEDGER}",)),
    Case("locked: the summary", hold=(f"LOCK TABLE {SUMMARY}",)),
    Case(
        "locked: the old counter, during the migration",
        hold=("LOCK TABLE user_2.vinted_job_stats",),
        hold_migration=True,
    ),
    Case("locked: jobs, during the migration too", hold=(f"LOCK TABLE {JOBS}",), hold_migration=True),
    Case("locked: pg_class", hold=("LOCK TABLE pg_catalog.pg_class IN SHARE MODE",)),
    Case("locked: rows of our stats", hold=(f"SELECT FROM {LEDGER} FOR UPDATE",)),
    before(
        "the old counter: sequence exhausted",
        "ALTER SEQUENCE template_tenant.vinted_job_stats_id_seq MAXVALUE 5",
    ),
    after(
        "our stats: sequence exhausted",
        "DO $$ DECLARE s text := (SELECT pg_get_serial_sequence('template_tenant.marketplace_job_stats', 'id')); BEGIN EXECUTE 'ALTER SEQUENCE ' || s || ' MAXVALUE 5'; END $$",
    ),
    after(
        "our stats: sequence behind its ids",
        "SELECT setval('template_tenant.vinted_job_stats_id_seq', 1, false)",
    ),
    before("the old counter: unlogged", "ALTER TABLE user_2.vinted_job_stats SET UNLOGGED"),
    before(
        "the old counter: an invalid unique index",
        ROOT
        + "UPDATE pg_index SET indisvalid = false WHERE indrelid = 'user_2.vinted_job_stats'::regclass AND NOT indisprimary"
        + AGAIN,
    ),
    before(
        "the old counter: no unique key, doubled rows",
        "DO $$ DECLARE c text := (SELECT conname FROM pg_constraint WHERE conrelid = 'user_2.vinted_job_stats'::regclass AND contype = 'u'); BEGIN EXECUTE 'ALTER TABLE user_2.vinted_job_stats DROP CONSTRAINT ' || quote_ident(c); END $$; INSERT INTO user_2.vinted_job_stats (action_type_id, date, total_jobs) SELECT action_type_id, date, 2 FROM user_2.vinted_job_stats",
    ),
    before("the old counter: a view uses it", "CREATE VIEW user_2.v AS SELECT * FROM user_2.vinted_job_stats"),
    before(
        "the old counter: a partitioned table",
        "DROP TABLE user_2.vinted_job_stats; CREATE TABLE user_2.vinted_job_stats (LIKE template_tenant.vinted_job_stats) PARTITION BY RANGE (date)",
    ),
    before(
        "the old counter: a column of another type",
        "ALTER TABLE user_2.vinted_job_stats ALTER total_jobs TYPE text, ALTER total_jobs DROP DEFAULT",
    ),
    before("the old counter: published, all tables", ROOT + "CREATE PUBLICATION p FOR ALL TABLES" + AGAIN),
    before("our name is a view already", f"CREATE VIEW {STATS} AS SELECT 1 AS id"),
    before("our name is a sequence already", f"CREATE SEQUENCE {STATS}"),
    before("our schema's name is taken", ROOT + "CREATE SCHEMA marketplace_stats AUTHORIZATION other" + AGAIN),
    before(
        "an event trigger refuses changes",
        ROOT
        + "CREATE FUNCTION public.e() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE EXCEPTION $$no change in working hours$$; END'; CREATE EVENT TRIGGER e ON ddl_command_start EXECUTE FUNCTION public.e()"
        + AGAIN,
    ),
    before(
        "CREATE on the database is missing",
        ROOT + "DO $$ BEGIN EXECUTE 'ALTER DATABASE ' || current_database() || ' OWNER TO postgres'; END $$" + AGAIN,
    ),
)
OURS = (
    after(
        "our stats: a trigger that swallows rows",
        f"CREATE FUNCTION user_2.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER t BEFORE INSERT ON {STATS} FOR EACH ROW EXECUTE FUNCTION user_2.f()",
    ),
    after(
        "our stats: a trigger that changes numbers",
        f"CREATE FUNCTION user_2.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.total_jobs := 99; RETURN NEW; END'; CREATE TRIGGER t BEFORE INSERT OR UPDATE ON {STATS} FOR EACH ROW EXECUTE FUNCTION user_2.f()",
    ),
    after(
        "our stats: a deferred trigger that changes numbers",
        f"CREATE FUNCTION user_2.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN UPDATE {STATS} SET total_jobs = 99 WHERE total_jobs <> 99; RETURN NULL; END'; CREATE CONSTRAINT TRIGGER t AFTER INSERT ON {STATS} DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION user_2.f()",
    ),
    after(
        "our facts: a trigger that swallows rows",
        f"CREATE FUNCTION user_2.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN CASE WHEN NEW.job_id % 2 = 0 THEN NEW END; END'; CREATE TRIGGER t BEFORE INSERT ON {FACTS} FOR EACH ROW EXECUTE FUNCTION user_2.f()",
    ),
    after("our stats: a rule", f"CREATE RULE r AS ON INSERT TO {STATS} DO INSTEAD NOTHING"),
    after("our facts: a rule", f"CREATE RULE r AS ON INSERT TO {FACTS} DO INSTEAD NOTHING"),
    after("the ledger: a rule", f"CREATE RULE r AS ON INSERT TO {LEDGER} DO INSTEAD NOTHING"),
    after(
        "our stats: row security",
        f"ALTER TABLE {STATS} ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON {STATS} USING (marketplace = 'vinted') WITH CHECK (true)",
    ),
    after(
        "our facts: row security",
        f"ALTER TABLE {FACTS} ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON {FACTS} USING (job_id % 2 = 0) WITH CHECK (true)",
    ),
    after("our stats: unlogged", f"ALTER TABLE {STATS} SET UNLOGGED"),
    after("our facts: unlogged", f"ALTER TABLE {FACTS} SET UNLOGGED"),
    after("our stats: a check of somebody else", f"ALTER TABLE {STATS} ADD CHECK (total_jobs < 1) NOT VALID"),
    after("our stats: a unique key too many", f"CREATE UNIQUE INDEX ON {STATS} (date) WHERE computed_at IS NOT NULL"),
    after(
        "our stats: a foreign key",
        f"CREATE TABLE user_2.types (id int PRIMARY KEY); ALTER TABLE {STATS} ADD FOREIGN KEY (action_type_id) REFERENCES user_2.types NOT VALID",
    ),
    after(
        "our stats: a column that must be given",
        f"ALTER TABLE {STATS} ADD forgotten int NOT NULL DEFAULT 0; ALTER TABLE {STATS} ALTER forgotten DROP DEFAULT",
    ),
    after("our stats: a column dropped", f"ALTER TABLE {STATS} DROP COLUMN wait_count CASCADE"),
    after(
        "our stats: a column of another type",
        f"DROP VIEW IF EXISTS user_2.vinted_job_stats; ALTER TABLE {STATS} ALTER duration_sum_ms TYPE int",
    ),
    after(
        "our stats: the date is a timestamp",
        f"DROP VIEW IF EXISTS user_2.vinted_job_stats; ALTER TABLE {STATS} ALTER date TYPE timestamptz",
    ),
    after(
        "our stats: an invalid key",
        ROOT
        + f"UPDATE pg_index SET indisvalid = false WHERE indrelid = '{STATS}'::regclass AND indisunique AND NOT indisprimary"
        + AGAIN,
    ),
    after(
        "our stats: replaced by a view",
        f"DROP VIEW IF EXISTS user_2.vinted_job_stats; ALTER TABLE {STATS} RENAME TO elsewhere; CREATE VIEW {STATS} AS SELECT * FROM user_2.elsewhere",
    ),
    after(
        "our stats: inherited from",
        f"CREATE TABLE user_2.child () INHERITS ({STATS}); INSERT INTO user_2.child (action_type_id, marketplace, date, total_jobs) VALUES (1, 'vinted', current_date - 1, 1000)",
    ),
    after("our facts: dropped", f"DROP TABLE {FACTS}"),
    after("the journal: dropped", "DROP TABLE user_2.marketplace_job_stats_changes"),
    after("the summary: dropped", f"DROP TABLE {SUMMARY}"),
    after("the summary: a rule", f"CREATE RULE r AS ON INSERT TO {SUMMARY} DO INSTEAD NOTHING"),
    after(
        "the summary: a trigger that changes numbers",
        f"CREATE FUNCTION public.f() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN NEW.total_jobs := 99; RETURN NEW; END'; CREATE TRIGGER t BEFORE INSERT OR UPDATE ON {SUMMARY} FOR EACH ROW EXECUTE FUNCTION public.f()",
    ),
    after(
        "the summary: row security",
        f"ALTER TABLE {SUMMARY} ENABLE ROW LEVEL SECURITY; CREATE POLICY p ON {SUMMARY} USING (marketplace = 'vinted') WITH CHECK (true)",
    ),
    after(
        "the version record: an unknown revision",
        "UPDATE user_2.marketplace_job_stats_version SET version_num = '9999'",
    ),
    after("the version record: gone", "DROP TABLE user_2.marketplace_job_stats_version"),
)
CASES = (*SETTINGS, *POOLERS, *SOURCES, *CATALOG, *OURS)
