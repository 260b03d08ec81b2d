"""The shapes of the tables: ours (`models.stats`, `models.summary`), and the application's, read-only.

Columns, keys and constraints belong here; queries, migrations and connections do not.

Every table of a tenant is declared in the placeholder schema `tenant`. A query runs on a connection whose
`schema_translate_map` names the real schema (`pipelines.tenants.on_tenant`). The two groups of tables live on two
MetaData objects, so that nothing that creates or compares our tables can ever touch the application's.
"""

TENANT = "tenant"
"""The placeholder schema."""

SHARED = "marketplace_stats"
"""The schema of our own, for what is about all tenants."""

MARKETPLACES = ("vinted", "ebay", "etsy")
"""The marketplaces that are counted; a job of any other is reported as `unknown_marketplace`."""
