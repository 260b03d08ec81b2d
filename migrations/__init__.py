"""How every tenant gets the tables of `models.stats`.

Run it with `alembic upgrade head`. In the order of reading: `env` takes the operator's options; `runner` goes over the
schemas; `tenant` is one schema's transaction; `shape` reads what it has, `canonical` says what it should have, and
`converge` gives the statements from the one to the other, with those of `rows` for what moves; `versions` holds one
file per change to our tables. Beside them, `grants` is for the role of the runs, `summary` for what is told, and
`drift` only compares.
"""
