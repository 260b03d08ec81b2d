"""The application's tables, with only the columns that are read. This project never changes their rows or columns."""

from datetime import datetime
from typing import ClassVar

from sqlalchemy import BigInteger, DateTime, Integer, MetaData, String, Table, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from models import TENANT


class SourceBase(DeclarativeBase):
    """On a MetaData of their own: see `models`."""

    metadata = MetaData()
    __table__: ClassVar[Table]


class MarketplaceJob(SourceBase):
    """One operation on one marketplace: publish, update, delete, sync ..."""

    __tablename__ = "marketplace_jobs"
    __table_args__ = ({"schema": TENANT},)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    marketplace: Mapped[str] = mapped_column(String(50), doc="`vinted`, `ebay` or `etsy`; nothing guards it.")
    action_type_id: Mapped[int] = mapped_column(Integer, doc="The id in `public.marketplace_action_types`.")
    # In some tenants an enum type: compare it as text.
    status: Mapped[str] = mapped_column(Text, doc="A job is finished if completed, failed, cancelled or expired.")
    retry_count: Mapped[int] = mapped_column(Integer, doc="How many times the job was tried again; null is none.")
    started_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True), doc="When the job started.")
    completed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True), doc="When the job ended: its day.")
    created_at: Mapped[datetime] = mapped_column(
        DateTime(timezone=True), doc="When the job was created; with its id, what the job is known by."
    )
    error_message: Mapped[str | None] = mapped_column(Text, doc="Why the job failed; its first line counts.")


class MarketplaceTask(SourceBase):
    """One step of a job: an HTTP call, a file upload ..."""

    __tablename__ = "marketplace_tasks"
    __table_args__ = ({"schema": TENANT},)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    job_id: Mapped[int | None] = mapped_column(Integer, doc="The job; null if the job was deleted.")
    # In some tenants an enum type: compare it as text.
    status: Mapped[str] = mapped_column(Text, doc="`success`, `failed` and `timeout` are counted.")
    retry_count: Mapped[int] = mapped_column(Integer, doc="How many times the task was tried again.")
    completed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True), doc="When the task ended.")


class MarketplaceActionType(SourceBase):
    """The names of the action types, one table for all tenants. It may be missing."""

    __tablename__ = "marketplace_action_types"
    __table_args__ = ({"schema": "public"},)

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    marketplace: Mapped[str] = mapped_column(String(50), doc="The marketplace of the action.")
    code: Mapped[str] = mapped_column(String(50), doc="`publish`, `update`, `delete`, `sync` ...")
    name: Mapped[str] = mapped_column(Text, doc="The name that people see.")
