"""An optional index on the application's jobs, by which a run finds a day without reading the table.

It is never part of the migration history: the table is the application's, and so is the choice. Read `index.py` first,
which is about one schema. `tenants.py` goes over all of them, for the command in `__main__.py` and the job in `job.py`.
"""
