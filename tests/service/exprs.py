"""What rules and dashboard ask Prometheus for, and what is exported."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from coloebpf.service import metrics
from coloebpf.service.status import BY_EXEMPTION, BY_POLICY
from tests.service import samples

REPO = Path(__file__).resolve().parents[2]
RULES = REPO / "deploy/prometheus/coloebpf.rules.yml"
RULE_TESTS = REPO / "deploy/prometheus/coloebpf.rules.test.yml"
DASHBOARD = REPO / "deploy/grafana/coloebpf.json"
OPERATIONS = REPO / "docs/operations.md"

SELECTOR = re.compile(r"\b((?:coloebpf|process)_\w+|up)\b(?:\{([^}]*)\})?")
MATCHER = re.compile(r'(\w+)\s*(=~|!=|!~|=)\s*"([^"]*)"')
FROM_PROMETHEUS = {"instance", "job"}  # labels that it adds itself
GROUPING = re.compile(r"\b(?:by|on)\s*\(([^)]*)\)")


@dataclass
class Exported:
    """Of a metric: its labels, with the values that the samples have."""

    labels: dict[str, set[str]] = field(default_factory=dict)


def exported() -> dict[str, Exported]:
    """Every name that a scrape can bring."""
    found: dict[str, Exported] = {}
    for family in metrics.families(samples.status(), samples.snapshot()):
        for sample in family.samples:
            entry = found.setdefault(sample.name, Exported())
            for label, value in sample.labels.items():
                entry.labels.setdefault(label, set()).add(value)
    found["coloebpf_pair_uncompared_rules"].labels["why"] = {BY_EXEMPTION, BY_POLICY}
    return found


def alerts() -> list[str]:
    return re.findall(r"^ +- alert: (\w+)$", RULES.read_text(), re.M)


def rule_expressions() -> list[str]:
    """The `expr` of each rule, folded ones joined."""
    text = RULES.read_text()
    return [" ".join(found.split()) for found in re.findall(r"expr: (?:>\n)?(.*?)\n +(?:for|labels):", text, re.S)]


def dashboard_expressions() -> list[str]:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    return [target["expr"] for panel in panels for target in panel.get("targets", ())]


def wrong_names(expression: str, known: dict[str, Exported]) -> list[str]:
    """Names, labels and fixed label values of an expression that nobody exports."""
    wrong = []
    for name, matchers in SELECTOR.findall(expression):
        if name == "up" or name.startswith("process_"):
            continue
        if name not in known:
            wrong.append(name)
            continue
        labels = known[name].labels
        for label, sign, value in MATCHER.findall(matchers):
            if label in FROM_PROMETHEUS:
                continue
            if label not in labels:
                wrong.append(f"{name}{{{label}}}")
            elif not value.startswith("$") and label not in ("pair", "nic", "path", "certificate"):
                parts = value.split("|") if "~" in sign else [value]
                wrong += [f'{name}{{{label}="{part}"}}' for part in parts if part not in labels[label]]
    names = [name for name, _ in SELECTOR.findall(expression) if name in known]
    for group in GROUPING.findall(expression):
        for label in filter(None, re.split(r"[,\s]+", group)):
            if label not in FROM_PROMETHEUS and names and not any(label in known[name].labels for name in names):
                wrong.append(f"grouping by {label}")
    return wrong
