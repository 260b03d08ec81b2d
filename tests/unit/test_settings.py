"""The configuration: its defaults, and the one sentence that refuses a wrong value."""

from datetime import date

import pytest

from pipelines import local
from pipelines.database import conninfo
from pipelines.settings import Settings, UsageError


def test_the_defaults_are_the_contract() -> None:
    """An empty environment is a valid configuration, with the defaults that others rely on."""
    settings = Settings.from_env({})
    assert (settings.start_date, settings.time_zone, settings.lookback_days) == (date(2025, 1, 1), "UTC", 3)
    assert (settings.sweep_days, settings.workers, settings.key_prefix) == (35, 4, ())
    assert settings.today_minutes == 15


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STATS_START_DATE", "2026-02-30"),
        ("STATS_START_DATE", "20260101"),
        ("STATS_START_DATE", "0001-01-01"),
        ("STATS_START_DATE", "9999-12-31"),
        ("STATS_TIMEZONE", "Mars"),
        ("STATS_TIMEZONE", "../../etc/passwd"),
        ("STATS_TIMEZONE", "Europe"),
        ("STATS_LOOKBACK_DAYS", "0"),
        ("STATS_SWEEP_DAYS", "367"),
        ("STATS_TODAY_MINUTES", "7"),
        ("STATS_TODAY_MINUTES", "0"),
        ("STATS_TODAY_MINUTES", "120"),
        ("STATS_WORKERS", "many"),
        ("STATS_WORKERS", "-1"),
        ("STATS_WORKERS", "65"),
        ("STATS_LOCK_TIMEOUT_MS", "1.5"),
        ("STATS_STATEMENT_TIMEOUT_MS", "٣"),
        ("STATS_KEY_PREFIX", "a/b"),
        ("STATS_REPORT_URL", "stats.test/report"),
        ("STATS_REPORT_URL", "javascript:alert(1)"),
        ("STATS_METRICS_FILE", "stats.prom"),
        ("STATS_METRICS_FILE", "/var/lib/stats.txt"),
        ("STATS_METRICS_FILE", "/.prom"),
    ],
)
def test_a_wrong_value_is_refused_in_one_sentence(name: str, value: str) -> None:
    """The sentence names the variable and the value, and fits on a line or two."""
    with pytest.raises(UsageError) as refusal:
        Settings.from_env({name: value})
    assert refusal.value.message.startswith(f"{name}={value!r} is not")
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < 150


@pytest.mark.parametrize(
    "url",
    [
        "mysql://root:s3cret@host/shop",
        "postgresql+psycopg2://root:s3cret@host/shop",
        "host=localhost password=s3cret",
        "postgresql://root:s3cret/more@host/shop",  # A slash that should have been encoded.
        "postgresql://root:s3@cret@host/shop",
        "postgresql://root:123/s3cret@host/shop",
        "postgresql://localhost:1/s3cret@host/shop",
        "postgresql://ro/ot:s3cret@host/shop",
        "postgresql://root:12?s3cret@host/shop",
        "postgresql://root:s3cret@host/shop?no_such_option=1",
    ],
)
def test_a_wrong_url_is_refused_without_repeating_it(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """A URL that libpq does not understand, or takes apart in the wrong places, shows no part of the password."""
    monkeypatch.setenv("DATABASE_URL", url)
    with pytest.raises(UsageError) as refusal:
        conninfo()
    assert refusal.value.message.startswith("DATABASE_URL is not a URL of PostgreSQL")
    assert "cret" not in refusal.value.message
    assert refusal.value.__cause__ is None


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p@h:5433/shop", {"host": "h", "port": "5433", "user": "u", "password": "p"}),
        ("postgresql+psycopg://u@h/shop?sslmode=require", {"host": "h", "sslmode": "require"}),
        ("postgresql://u@/shop?host=/run/postgresql", {"host": "/run/postgresql"}),
        ("postgresql://u:p%40%2F@h/shop", {"password": "p@/"}),
        ("postgresql://u@h1,h2:5433/shop?connect_timeout=3", {"host": "h1,h2", "connect_timeout": "3"}),
    ],
)
def test_urls_mean_what_libpq_says(monkeypatch: pytest.MonkeyPatch, url: str, expected: dict[str, str]) -> None:
    """Both schemes, libpq's options, sockets, several hosts and percent-encoding arrive as they were meant."""
    from psycopg.conninfo import conninfo_to_dict

    monkeypatch.setenv("DATABASE_URL", url)
    assert conninfo_to_dict(conninfo()).items() >= {**expected, "dbname": "shop"}.items()


def test_the_migration_has_a_role_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIGRATION_DATABASE_URL is used by the migration alone, and defaults to DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://runner@h/shop")
    assert "runner" in conninfo("MIGRATION_DATABASE_URL")
    monkeypatch.setenv("MIGRATION_DATABASE_URL", "postgresql://owner@h/shop")
    assert "owner" in conninfo("MIGRATION_DATABASE_URL")
    assert "runner" in conninfo()


@pytest.mark.parametrize("variables", [(), ("MIGRATION_DATABASE_URL",)])
@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_url_is_refused(monkeypatch: pytest.MonkeyPatch, empty: str, variables: tuple[str, ...]) -> None:
    """Set but empty is a line that was forgotten: no embedded server is started, and nothing is loaded."""
    monkeypatch.setattr(local, "start", lambda: pytest.fail("The embedded server was started."))
    monkeypatch.setenv("DATABASE_URL", empty)
    monkeypatch.setenv("MIGRATION_DATABASE_URL", "postgresql://owner@h/shop")
    with pytest.raises(UsageError, match="DATABASE_URL is empty: set it to "):
        conninfo(*variables)
    with pytest.raises(UsageError, match="DATABASE_URL is empty: set it to "):
        Settings.from_env()


def test_an_empty_url_of_the_migration_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """MIGRATION_DATABASE_URL set but empty is as DATABASE_URL; where neither is set, the embedded server is."""
    monkeypatch.setenv("MIGRATION_DATABASE_URL", "")
    monkeypatch.setattr(local, "start", lambda: "postgresql://embedded@h/shop")
    assert "embedded" in conninfo("MIGRATION_DATABASE_URL")
    monkeypatch.setenv("DATABASE_URL", "postgresql://runner@h/shop")
    assert "runner" in conninfo("MIGRATION_DATABASE_URL")
