"""How every tenant gets the tables of `models.stats`.

`env` goes over the tenants; `shape` reads what a tenant has; `converge` says what has to be done; `versions` holds one
file per change to our tables. Run it with `alembic upgrade head`.
"""
