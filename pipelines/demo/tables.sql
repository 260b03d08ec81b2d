CREATE TABLE {schema}.marketplace_jobs (
    id serial PRIMARY KEY,
    marketplace varchar(50) NOT NULL,
    action_type_id integer NOT NULL REFERENCES public.marketplace_action_types (id),
    product_id bigint,
    batch_job_id integer,
    status {job_status} NOT NULL DEFAULT 'pending',
    priority integer NOT NULL DEFAULT 3,
    retry_count integer NOT NULL DEFAULT 0,
    max_retries integer NOT NULL DEFAULT 3,
    error_message text,
    input_data jsonb,
    result_data jsonb,
    started_at timestamptz,
    completed_at timestamptz,
    expires_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX ON {schema}.marketplace_jobs (status);
CREATE INDEX ON {schema}.marketplace_jobs (created_at);
CREATE INDEX ON {schema}.marketplace_jobs (marketplace);

CREATE TABLE {schema}.marketplace_tasks (
    id serial PRIMARY KEY,
    job_id integer REFERENCES {schema}.marketplace_jobs (id) ON DELETE SET NULL,
    task_type varchar(100),
    status {task_status} NOT NULL DEFAULT 'pending',
    retry_count integer NOT NULL DEFAULT 0,
    started_at timestamptz,
    completed_at timestamptz,
    created_at timestamptz NOT NULL DEFAULT now(),
    payload jsonb,
    result jsonb
);
CREATE INDEX ON {schema}.marketplace_tasks (job_id, status);

CREATE TABLE {schema}.vinted_job_stats (
    id serial PRIMARY KEY,
    action_type_id integer NOT NULL,
    date date NOT NULL,
    total_jobs integer NOT NULL DEFAULT 0,
    success_count integer NOT NULL DEFAULT 0,
    failure_count integer NOT NULL DEFAULT 0,
    avg_duration_ms integer,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT {unique_name} UNIQUE (action_type_id, date)
);
