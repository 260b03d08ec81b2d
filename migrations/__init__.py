"""How every tenant gets the tables of `models`.

Run it with `alembic upgrade head`. In the order of reading: `env` takes the operator's options; `runner` goes over the
schemas; `tenant` is one schema's transaction. What is to be done: `shape` reads what a schema has, `states` names the
state that it is in, `plan` decides on the action. What it should have: `target` says it for the newest revision, from
the models, and `first` for revision 0001, frozen. The statements from the one to the other: `converge` for any table of
ours, `stats` for the one with a history, `view` for its old name, and `rows` for what moves, counted. `versions` holds
one file per change to our tables. Beside them, `grants` is for the role of the runs, `summary` for what people see, and
`drift` only compares.
"""
