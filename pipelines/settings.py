"""The configuration, read from the environment once and checked: every wrong value is refused with what is allowed.

What belongs here: names, defaults and limits of the environment variables. Those that may hold a secret are
read where they are used, so that no object that Dagster may show ever holds them: `DATABASE_URL`,
`MIGRATION_DATABASE_URL` (`pipelines.database`) and `ALERT_WEBHOOK_URL` (`pipelines.alerts`).
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from zoneinfo import ZoneInfo

import click


class UsageError(click.ClickException):
    """What the user has to mend, said in one sentence: what is wrong, where, and what to do.

    A ClickException, because the command lines of Dagster and of this project print it as that sentence alone.
    """


@dataclass(frozen=True)
class Settings:
    """The checked configuration. Raises UsageError from `from_env` at the first value that is not allowed."""

    start_date: date
    time_zone: str
    lookback_days: int
    sweep_days: int
    today_minutes: int
    failure_reasons: bool
    workers: int
    lock_timeout_ms: int
    statement_timeout_ms: int
    key_prefix: tuple[str, ...]
    report_dir: Path
    metrics_file: Path | None
    dagster_url: str | None
    report_url: str | None
    has_alerts: bool

    @classmethod
    def from_env(cls, env: Mapping[str, str] = os.environ) -> "Settings":
        database_url(env=env)  # Only looked at: what is loaded without a database is told before the night.
        return cls(
            start_date=_date(env, "STATS_START_DATE", "2025-01-01"),
            time_zone=_time_zone(env, "STATS_TIMEZONE", "UTC"),
            lookback_days=_whole_number(env, "STATS_LOOKBACK_DAYS", 3, 1, 366),
            sweep_days=_whole_number(env, "STATS_SWEEP_DAYS", 35, 1, 366),
            today_minutes=_today_minutes(env, "STATS_TODAY_MINUTES", 15),
            failure_reasons=_yes_or_no(env, "STATS_FAILURE_REASONS", default=True),
            workers=_whole_number(env, "STATS_WORKERS", 4, 1, 64),
            lock_timeout_ms=_whole_number(env, "STATS_LOCK_TIMEOUT_MS", 10_000, 1, 3_600_000),
            statement_timeout_ms=_whole_number(env, "STATS_STATEMENT_TIMEOUT_MS", 1_800_000, 1, 86_400_000),
            key_prefix=_key_prefix(env, "STATS_KEY_PREFIX"),
            report_url=_web_address(env, "STATS_REPORT_URL"),
            report_dir=_folder(env, "STATS_REPORT_DIR", Path(__file__).parents[1] / ".local" / "report"),
            metrics_file=_metrics_file(env, "STATS_METRICS_FILE"),
            dagster_url=_web_address(env, "STATS_DAGSTER_URL"),
            has_alerts=alert_webhook_url(env) is not None,
        )


def database_url(*variables: str, env: Mapping[str, str] = os.environ) -> tuple[str, str] | None:
    """The first of these variables and `DATABASE_URL` that is set, with its value; None for the embedded server.

    Raises UsageError if `DATABASE_URL` is there but empty. So a service sets it empty before it reads its own file, and
    a line that was forgotten there never starts the embedded server.
    """
    if not env.get("DATABASE_URL", "unset").strip():
        raise UsageError("DATABASE_URL is empty: set it to postgresql://..., or unset it to use the embedded server.")
    for variable in (*variables, "DATABASE_URL"):
        if url := env.get(variable, "").strip():
            return variable, url
    return None


def alert_webhook_url(env: Mapping[str, str] = os.environ) -> str | None:
    """Where alerts are posted to; None if nowhere. Raises UsageError, which never repeats the value: it is a secret."""
    url = env.get("ALERT_WEBHOOK_URL", "").strip()
    # Without a user before the host, which a client would take apart in its own way, and show.
    if url and not re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?#][!-~]*)?", url):
        raise UsageError("ALERT_WEBHOOK_URL is not an address to post to: write it as https://host/path.")
    return url or None


def _whole_number(env: Mapping[str, str], name: str, default: int, low: int, high: int) -> int:
    text = env.get(name, "").strip() or str(default)
    if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
        raise UsageError(f"{name}={text!r} is not allowed: give a whole number from {low} to {high}.")
    return int(text)


def _today_minutes(env: Mapping[str, str], name: str, default: int) -> int:
    allowed = [number for number in range(5, 61) if 60 % number == 0]  # What a cron can say.
    text = env.get(name, "").strip() or str(default)
    if text not in map(str, allowed):
        listed = ", ".join(map(str, allowed))
        raise UsageError(
            f"{name}={text!r} is not allowed: an hour has to be a multiple of it, so give one of {listed}."
        )
    return int(text)


def _yes_or_no(env: Mapping[str, str], name: str, *, default: bool) -> bool:
    text = env.get(name, "").strip() or ("yes" if default else "no")
    if text not in ("yes", "no"):
        raise UsageError(f"{name}={text!r} is not allowed: say yes or no.")
    return text == "yes"


def _date(env: Mapping[str, str], name: str, default: str) -> date:
    text = env.get(name, "").strip() or default
    try:
        if not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", text):
            raise ValueError
        day = date.fromisoformat(text)
    except ValueError:
        raise UsageError(f"{name}={text!r} is not a date: write it as YYYY-MM-DD, for instance {default}.") from None
    if not 1990 <= day.year <= 2100:
        raise UsageError(f"{name}={text!r} is not allowed: give a day between the years 1990 and 2100.")
    return day


def _time_zone(env: Mapping[str, str], name: str, default: str) -> str:
    text = env.get(name, "").strip() or default
    try:
        ZoneInfo(text)
    except (ValueError, OSError):  # ZoneInfoNotFoundError is a KeyError, which str() would quote.
        known = False
    except KeyError:
        known = False
    else:
        known = True
    if not known:
        raise UsageError(f"{name}={text!r} is not a time zone: give a name such as UTC or Europe/Paris.")
    return text


def _folder(env: Mapping[str, str], name: str, default: Path) -> Path:
    path = Path(env.get(name, "").strip() or default)
    if not path.is_absolute():
        # The processes of Dagster work in different folders.
        raise UsageError(f"{name}={str(path)!r} is not allowed: give the whole path of a folder, from / on.")
    return path


def _metrics_file(env: Mapping[str, str], name: str) -> Path | None:
    text = env.get(name, "").strip()
    path = Path(text)
    if text and not (path.is_absolute() and path.suffix == ".prom"):
        raise UsageError(
            f"{name}={text!r} is not allowed: give the whole path of a file, from / on, that ends in .prom."
        )
    # Several databases may have the same setting, and node_exporter reads one folder.
    prefix = _key_prefix(env, "STATS_KEY_PREFIX")
    return path.with_stem(".".join([path.stem, *prefix])) if text else None


def _web_address(env: Mapping[str, str], name: str) -> str | None:
    text = env.get(name, "").strip().rstrip("/")
    if text and not re.fullmatch(r"https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?(/[!-~]*)?", text):
        raise UsageError(f"{name}={text!r} is not allowed: write it as https://host or https://host/path.")
    return text or None


def _key_prefix(env: Mapping[str, str], name: str) -> tuple[str, ...]:
    text = env.get(name, "").strip()
    if not text:
        return ()
    if not re.fullmatch(r"[A-Za-z0-9_]+", text):
        raise UsageError(f"{name}={text!r} is not allowed: use letters, digits and underscores, for instance eu.")
    return (text,)


@click.command()
def main() -> None:
    """Refuses what the environment holds that is not allowed, in one sentence; else it says nothing."""
    Settings.from_env()


if __name__ == "__main__":
    main()
