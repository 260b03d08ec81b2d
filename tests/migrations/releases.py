"""The releases to come: a copy of the project for each, with one revision more than the one before.

The second is made by the page that says how to add a column, word by word; the third has an index, a table of ours and
a column of our own schema.
"""

import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT, url_of

COLUMN = "annotated_count"
TABLE = "marketplace_job_notes"

THIRD_MODELS = '''

class MarketplaceJobNote(StatsBase):
    """A table of the third release."""

    __tablename__ = "marketplace_job_notes"
    __table_args__ = (
        CheckConstraint("length > 0", name="length"),
        Index("ix_marketplace_job_notes_day", "date", "length"),
        {"schema": TENANT},
    )

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    date: Mapped[dt.date] = mapped_column(Date)
    length: Mapped[int] = mapped_column(BigInteger, server_default="1")
'''
THIRD_REVISION = '''"""An index, a table, and a column of our own schema."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade(target: str) -> None:
    globals()[f"upgrade_{target}"]()


def downgrade(target: str) -> None:
    globals()[f"downgrade_{target}"]()


def upgrade_tenant() -> None:
    op.execute("UPDATE marketplace_job_stats SET annotated_count = total_jobs WHERE annotated_count IS NULL")
    op.create_index("ix_marketplace_job_stats_total", "marketplace_job_stats", ["total_jobs"])
    op.create_table(
        "marketplace_job_notes",
        sa.Column("id", sa.BigInteger, primary_key=True),
        sa.Column("date", sa.Date, nullable=False),
        sa.Column("length", sa.BigInteger, server_default="1", nullable=False),
        sa.CheckConstraint("length > 0", name="ck_marketplace_job_notes_length"),
    )
    op.create_index("ix_marketplace_job_notes_day", "marketplace_job_notes", ["date", "length"])


def downgrade_tenant() -> None:
    op.drop_table("marketplace_job_notes")
    op.drop_index("ix_marketplace_job_stats_total", "marketplace_job_stats")


def upgrade_shared() -> None:
    op.add_column("marketplace_global_summary", sa.Column("annotated_count", sa.BigInteger))


def downgrade_shared() -> None:
    op.drop_column("marketplace_global_summary", "annotated_count")
'''


@dataclass
class Release:
    """A copy of the project, or the project itself."""

    folder: Path

    def run(self, conninfo: str, *command: str, status: int | None = 0) -> str:
        """What a command of the release prints; asserts its exit status, if one is given."""
        program, *arguments = command if len(command) > 1 else shlex.split(command[0])
        result = subprocess.run(
            [Path(sys.executable).parent / program, *arguments],
            cwd=self.folder,
            env={
                "PATH": os.environ["PATH"],
                "DATABASE_URL": url_of(conninfo),
                "PYTHONDONTWRITEBYTECODE": "1",
                **{name: value for name, value in os.environ.items() if name.startswith("STATS_")},
            },
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert status is None or result.returncode == status, (command, result.stdout, result.stderr)
        return result.stdout + result.stderr

    def alembic(self, conninfo: str, *arguments: str, status: int | None = 0) -> str:
        words = arguments if len(arguments) > 1 else shlex.split(arguments[0])
        return self.run(conninfo, "alembic", *words, status=status)

    def drift(self, conninfo: str, status: int = 0) -> str:
        return self.run(conninfo, "python -m migrations.drift", status=status)


def make_releases(parent: Path) -> list[Release]:
    """The project and two that follow it, in folders under this one."""
    folders = [ROOT, parent / "second", parent / "third"]
    for before, folder in itertools.pairwise(folders):
        folder.mkdir()
        for name in ("models", "migrations", "pipelines"):
            shutil.copytree(before / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(before / "alembic.ini", folder)
        (add_by_the_page if before is ROOT else add_third)(folder)
    return [Release(folder) for folder in folders]


def add_by_the_page(folder: Path) -> None:
    """What `docs/add-a-column.md` says, up to where it is tried."""
    page = (ROOT / "docs" / "add-a-column.md").read_text()
    column, functions = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    [command] = [line for line in page.splitlines() if line.startswith("$ alembic revision")]
    models = folder / "models" / "stats.py"
    text = models.read_text()
    cut = text.index("\n\nclass MarketplaceJobStatsDay(")
    models.write_text(text[:cut] + column + text[cut:])
    Release(folder).run("host=/nowhere dbname=x user=x", command.removeprefix("$ "))
    [revision] = (folder / "migrations" / "versions").glob("0003*.py")
    text = revision.read_text()
    start, end = text.index("def upgrade_tenant"), text.index("\n\ndef upgrade_shared")
    revision.write_text(text[:start] + functions + text[end:])


def add_third(folder: Path) -> None:
    """A revision with more in it."""
    models = folder / "models" / "stats.py"
    text = models.read_text().replace(
        '        {"schema": TENANT},',
        '        Index("ix_marketplace_job_stats_total", "total_jobs"),\n        {"schema": TENANT},',
        1,
    )
    models.write_text(text + THIRD_MODELS)
    summary = folder / "models" / "summary.py"
    column = "\n    annotated_count: Mapped[int | None] = mapped_column(BigInteger)\n"
    summary.write_text(summary.read_text().rstrip("\n") + column)
    (folder / "migrations" / "versions" / "0004_more.py").write_text(THIRD_REVISION)
