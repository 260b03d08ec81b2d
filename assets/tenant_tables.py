"""Our own tables of a tenant beside the stats, as external assets: they are written in the stats' own transaction.

What is in them belongs to `models.stats`; what writes them, to the asset `marketplace_job_stats`.
"""

import dagster as dg

from assets import lineage
from assets.lineage import Sources, column_lineage
from assets.sources import column_schema, source_keys
from models.stats import (
    MarketplaceJobFact,
    MarketplaceJobStats,
    MarketplaceJobStatsChange,
    MarketplaceJobStatsDay,
    StatsBase,
)

_DESCRIPTIONS: dict[type[StatsBase], str] = {
    MarketplaceJobFact: """
The fact table in each tenant's schema: one row per finished job, as it was last seen. The stats of a day are the
aggregate of its facts. A job that the application deletes keeps its fact, so it never ceases to count.
""",
    MarketplaceJobStatsDay: """
The ledger in each tenant's schema: which days are computed for that tenant, by which definition, from how many jobs and
tasks, in which time zone, and which were held back. It is the single truth about what is there.
""",
    MarketplaceJobStatsChange: """
The journal in each tenant's schema: the stats rows of settled days that changed afterwards, with both numbers, the run
and the cause.
""",
}
_LINEAGE: dict[type[StatsBase], Sources] = {
    MarketplaceJobFact: lineage.FACTS,
    MarketplaceJobStatsDay: lineage.LEDGER,
    MarketplaceJobStatsChange: lineage.JOURNAL,
}


def table_key(model: type[StatsBase], key_prefix: tuple[str, ...] = ()) -> dg.AssetKey:
    """The key of the asset that is this table in each tenant's schema."""
    return dg.AssetKey([*key_prefix, model.__tablename__])


def build_tenant_tables(key_prefix: tuple[str, ...] = ()) -> list[dg.AssetSpec]:
    """One external asset per table: the facts come from the sources, ledger and journal after the stats."""
    stats = [table_key(MarketplaceJobStats, key_prefix)]
    return [
        dg.AssetSpec(
            table_key(model, key_prefix),
            deps=source_keys(key_prefix) if model is MarketplaceJobFact else stats,
            description=description,
            group_name="marketplace_stats",
            kinds={"postgres"},
            owners=["team:data"],
            tags={"scope": "tenant"},
            metadata={
                "dagster/table_name": model.__tablename__,
                "dagster/column_schema": column_schema(model.__table__),
                "dagster/column_lineage": column_lineage(_LINEAGE[model], key_prefix),
            },
        )
        for model, description in _DESCRIPTIONS.items()
    ]
