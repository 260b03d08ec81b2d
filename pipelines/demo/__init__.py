"""`make demo`: an application's database with three months of jobs, migrated and computed by the real commands.

Nothing of the product imports this package.
"""
