"""The application's tables, as external assets: they are read here, and materialized by nobody in this project."""

import dagster as dg
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql.base import PGDialect

from models.sources import MarketplaceActionType, MarketplaceJob, MarketplaceTask, SourceBase

_DESCRIPTIONS: dict[type[SourceBase], str] = {
    MarketplaceJob: "The operations on marketplaces, in each tenant's schema. Owned by the application; read-only.",
    MarketplaceTask: "The steps of the jobs, in each tenant's schema. Owned by the application; read-only.",
    MarketplaceActionType: "The names of the action types, in public. Owned by the application; may be missing.",
}


def column_schema(table: sa.Table) -> dg.TableSchema:
    """A model's columns as Dagit shows them: PostgreSQL's type, whether null is allowed, and the meaning."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                column.name,
                type=column.type.compile(dialect=PGDialect()).lower(),  # type: ignore[no-untyped-call]
                description=column.doc,
                constraints=dg.TableColumnConstraints(nullable=bool(column.nullable)),
            )
            for column in table.columns
        ]
    )


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
            owners=["team:application"],
            tags={"scope": "all-tenants" if model is MarketplaceActionType else "tenant"},
            metadata={
                "dagster/table_name": model.__tablename__,
                "dagster/column_schema": column_schema(model.__table__),
            },
        )
        for model, description in _DESCRIPTIONS.items()
    ]
