"""Alert rules and dashboard: Prometheus' own tests of them, and their names against what is really exported."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.service import exprs

KNOWN = exprs.exported()
needs_promtool = pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is in Debian's package prometheus")


def promtool(*arguments: str, where: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["promtool", *arguments], cwd=where, capture_output=True, text=True, check=False)


@needs_promtool
def test_the_rules_are_rules() -> None:
    done = promtool("check", "rules", exprs.RULES.name, where=exprs.RULES.parent)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_the_scrape_configuration_is_one(tmp_path: Path) -> None:
    text = (exprs.RULES.parent / "scrape.yml").read_text()
    (tmp_path / "prometheus.yml").write_text(text.replace("/etc/prometheus/coloebpf.rules.yml", str(exprs.RULES)))
    done = promtool("check", "config", "prometheus.yml", where=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(exprs.alerts())} rules found" in done.stdout


@needs_promtool
def test_each_alert_fires_when_it_should_and_only_then() -> None:
    done = promtool("test", "rules", exprs.RULE_TESTS.name, where=exprs.RULE_TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr


BREAKS = (
    ("coloebpf_pair_undecided == 1", "coloebpf_pair_undecided == 2"),
    ("for: 10m", "for: 1m"),
    ('state=~"passthrough|promoted"', 'state=~"passthrough"'),
    ("30 * 86400", "40 * 86400"),
    ("> 0.75", ">= 0.75"),
    ("on (instance, job, pair) coloebpf_pair_state", "on (instance, job) coloebpf_pair_epoch"),
    ("[1m])) == 0", "[1m])) >= 0"),
    ("severity: critical", "severity: warning"),
)


@needs_promtool
@pytest.mark.parametrize(("old", "new"), BREAKS)
def test_a_broken_rule_is_found_by_its_tests(tmp_path: Path, old: str, new: str) -> None:
    text = exprs.RULES.read_text()
    assert old in text
    (tmp_path / exprs.RULES.name).write_text(text.replace(old, new, 1))
    shutil.copy(exprs.RULE_TESTS, tmp_path)
    assert promtool("test", "rules", exprs.RULE_TESTS.name, where=tmp_path).returncode == 1


@pytest.mark.parametrize("alert", exprs.alerts())
def test_each_alert_has_a_test_that_fires_one_that_does_not_and_a_page(alert: str) -> None:
    tests = exprs.RULE_TESTS.read_text()
    assert f"- name: {alert} fires\n" in tests
    assert f"- name: {alert} is silent\n" in tests
    section = re.search(rf"^### {alert}\n(.*?)(?=^##|\Z)", exprs.OPERATIONS.read_text(), re.M | re.S)
    assert section, f"docs/operations.md has no section for {alert}"
    assert "Do: " in section[1]


def test_the_operations_page_has_no_alert_that_is_not_there() -> None:
    assert set(re.findall(r"^### (Coloebpf\w+)$", exprs.OPERATIONS.read_text(), re.M)) == set(exprs.alerts())


@pytest.mark.parametrize("expression", exprs.rule_expressions() + exprs.dashboard_expressions())
def test_nothing_is_asked_for_that_is_not_exported(expression: str) -> None:
    assert exprs.wrong_names(expression, KNOWN) == []


def test_every_rule_was_looked_at() -> None:
    assert len(exprs.rule_expressions()) == len(exprs.alerts())


@pytest.mark.parametrize(
    "expression",
    [
        "coloebpf_made_up == 1",
        'coloebpf_pair_state{colour="red"} == 1',
        'coloebpf_pair_state{state="asleep"} == 1',
        'coloebpf_pair_state{state=~"halted|asleep"} == 1',
        "sum by (colour) (rate(coloebpf_checkpoints_total[5m]))",
        "rate(coloebpf_checkpoints[5m])",
    ],
)
def test_a_wrong_name_is_found(expression: str) -> None:
    assert exprs.wrong_names(expression, KNOWN)


def test_series_of_the_rules_tests_are_exported() -> None:
    for series in re.findall(r"- series: '([^']*)'", exprs.RULE_TESTS.read_text()):
        assert exprs.wrong_names(series.replace('le="2.5"', 'le="+Inf"'), KNOWN) == []


def test_the_dashboards_panels_are_whole_and_do_not_overlap() -> None:
    panels = json.loads(exprs.DASHBOARD.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"])
