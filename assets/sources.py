"""The application's tables, as external assets: they are read here, and materialized by nobody in this project."""

import dagster as dg

from models.sources import MarketplaceActionType, MarketplaceJob, MarketplaceTask, SourceBase

_DESCRIPTIONS: dict[type[SourceBase], str] = {
    MarketplaceJob: "The operations on marketplaces, in each tenant's schema. Owned by the application; read-only.",
    MarketplaceTask: "The steps of the jobs, in each tenant's schema. Owned by the application; read-only.",
    MarketplaceActionType: "The names of the action types, in `public`. Owned by the application; may be missing.",
}


def source_keys(key_prefix: tuple[str, ...] = ()) -> list[dg.AssetKey]:
    """The keys of the tables that the stats are computed from."""
    return [dg.AssetKey([*key_prefix, model.__tablename__]) for model in _DESCRIPTIONS]


def build_sources(key_prefix: tuple[str, ...] = ()) -> list[dg.AssetSpec]:
    """One external asset per table, with the columns that are read."""
    return [
        dg.AssetSpec(
            dg.AssetKey([*key_prefix, model.__tablename__]),
            description=description,
            group_name="application",
            kinds={"postgres"},
            metadata={
                "dagster/table_name": model.__tablename__,
                "dagster/column_schema": dg.TableSchema(
                    columns=[
                        dg.TableColumn(column.name, type=str(column.type).lower(), description=column.doc)
                        for column in model.__table__.columns
                    ]
                ),
            },
        )
        for model, description in _DESCRIPTIONS.items()
    ]
