"""The example of alert rules: Prometheus understands them, they fire when they should, and name metrics that exist."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pipelines.definitions import build_defs
from pipelines.ledgers import OUTCOMES
from pipelines.metrics import GAUGES
from pipelines.settings import Settings
from tests.conftest import ROOT

RULES, TESTS = ROOT / "deploy" / "prometheus-alerts.yaml", ROOT / "tests" / "unit" / "alert_rules.yaml"


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not there: Debian's package prometheus has it")
@pytest.mark.parametrize(("command", "path"), [("check", RULES), ("test", TESTS)])
def test_prometheus_understands_the_rules(command: str, path: Path) -> None:
    """`promtool check rules` finds nothing wrong, and each of them fires in `promtool test rules`, and only then."""
    result = subprocess.run(["promtool", command, "rules", path], capture_output=True, text=True)  # noqa: S607
    assert result.returncode == 0, result.stdout + result.stderr
    assert "SUCCESS" in result.stdout
    names = set(re.findall(r"alert: (\w+)", RULES.read_text()))
    assert set(re.findall(r"alertname: (\w+)\s+exp_alerts", TESTS.read_text())) == names


def test_the_rules_name_what_is_there() -> None:
    """Every metric, job and outcome that a rule names exists: a rule about nothing never fires."""
    text = RULES.read_text()
    assert set(re.findall(r"marketplace_stats_(\w+)", text)) <= GAUGES.keys()
    [outcomes] = re.findall(r'outcome=~"(.*?)"', text)
    assert set(outcomes.split("|")) <= set(OUTCOMES)
    for job in re.findall(r'dagster_job="(\w+)"', text):
        assert build_defs(Settings.from_env({})).resolve_job_def(job)
