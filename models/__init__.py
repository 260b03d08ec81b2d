"""The shapes of the tables: ours (`models.stats`) and the application's, read-only (`models.sources`).

Columns, keys and constraints belong here; queries, migrations and connections do not.

Every table of a tenant is declared in the placeholder schema `tenant`. A query runs on a connection whose
`schema_translate_map` names the real schema (`pipelines.tenants.on_tenant`). The two groups of tables live on two
MetaData objects, so that nothing that creates or compares our tables can ever touch the application's.
"""

TENANT = "tenant"
"""The placeholder schema."""

MARKETPLACES = ("vinted", "ebay", "etsy")
"""The marketplaces that are counted; a job of any other is reported as `unknown_marketplace`."""
