"""A real Prometheus, with the rules, scrapes the exporter over a running lab."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from coloebpf.lab import commands, redis
from coloebpf.lab.plan import LabPlan
from coloebpf.netns import inside
from tests.service import exprs
from tests.service.etcds import free_ports

pytestmark = [
    pytest.mark.lab,
    pytest.mark.real_time,
    pytest.mark.skipif(not shutil.which("prometheus"), reason="Debian's package prometheus is not installed"),
]
SERVICE = 9877  # the lab's own service has its default, in a namespace of its own
WAIT = 30.0  # seconds for Prometheus to start, or to have scraped something
CLI = (sys.executable, "-m", "coloebpf", "lab")
PATIENT_MS = "20000"  # a busy machine is no lost host
SIZE = 100_000
CONFIG = """
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
scrape_configs:
  - job_name: coloebpf
    static_configs: [targets: ["127.0.0.1:{exporter}"]]
  - job_name: service
    static_configs: [targets: ["127.0.0.1:{service}"]]
rule_files: ["{rules}"]
"""


class Prometheus:
    """Its HTTP interface, inside the primary's network namespace."""

    def __init__(self, namespace: str, port: int) -> None:
        self._namespace, self._port = namespace, port

    def ask(self, path: str, **query: str) -> Any:
        with inside(self._namespace):
            url = f"http://127.0.0.1:{self._port}/api/v1/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)
        assert found["status"] == "success"
        return found["data"]

    def value(self, expression: str) -> float | None:
        rows = self.ask("query", query=expression)["result"]
        return float(rows[0]["value"][1]) if rows else None

    def wait(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + WAIT
        while True:
            try:
                if condition():
                    return
            except OSError:
                pass  # not listening yet
            assert time.monotonic() < deadline, "Prometheus did not come to it"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def lab() -> Iterator[LabPlan]:
    if os.geteuid() != 0:
        pytest.skip("labs need root")
    plan = LabPlan(f"p{os.getpid()}", "process", command=redis.SERVER)
    try:
        made = ("up", "--name", plan.name, "--guests", "process", "--peer-timeout", PATIENT_MS, "--", *redis.SERVER)
        subprocess.run([*CLI, *made], check=True)
        yield plan
    finally:
        commands.down(plan)


@pytest.fixture(scope="module")
def prometheus(lab: LabPlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    home = tmp_path_factory.mktemp("prometheus")
    subprocess.run([*CLI, "exec", "--name", lab.name, "primary", "--", "ip", "link", "set", "lo", "up"], check=True)
    with inside(lab.namespace("primary")):
        port, shown = free_ports(2)
    # The exporter shows a status with everything in it.
    (home / "prometheus.yml").write_text(CONFIG.format(exporter=shown, service=SERVICE, rules=exprs.RULES))

    def start(*words: str, **options: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*CLI, "exec", "--name", lab.name, "primary", "--", *words], cwd=exprs.REPO, text=True, **options
        )

    with ExitStack() as running:
        exporter = start(
            *(sys.executable, "-m", "tests.service.exporter", str(lab.pin_dir("primary")), str(shown)),
            stdout=subprocess.PIPE,
        )
        running.callback(exporter.wait)
        running.callback(exporter.kill)
        assert exporter.stdout
        assert exporter.stdout.readline() == "ready\n"
        log = running.enter_context((home / "log").open("w"))
        server = start(
            *("prometheus", f"--config.file={home}/prometheus.yml", f"--storage.tsdb.path={home}/data"),
            *(f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"),
            stdout=log,
            stderr=log,
        )
        running.callback(server.wait)
        running.callback(server.kill)
        found = Prometheus(lab.namespace("primary"), port)
        found.wait(lambda: found.value('up{job="coloebpf"}') == 1)
        yield found


def counters(plan: LabPlan) -> dict[str, Any]:
    done = subprocess.run([*CLI, "status", "--name", plan.name, "--json"], capture_output=True, check=True)
    nic: dict[str, Any] = json.loads(done.stdout)["nics"][0]
    return nic


def test_what_the_programs_counted_is_what_prometheus_has(prometheus: Prometheus, lab: LabPlan) -> None:
    client = redis.Connection(lab, "client", lab.nic_list()[0].guest_v4)
    assert client.ask("SET", "key", "x" * SIZE) == b"OK"
    assert client.ask("GET", "key") == b"x" * SIZE
    client.close()
    prometheus.wait(lambda: (prometheus.value('coloebpf_compared_bytes_total{pair="web"}') or 0) >= SIZE)

    def same() -> bool:
        nic = counters(lab)
        wanted = {
            "coloebpf_compared_bytes_total": nic["compared_bytes"],
            "coloebpf_mirrored_packets_total": nic["mirrored_packets"],
            'sum(coloebpf_released_packets_total{pair="web"})': nic["released_packets"],
            'coloebpf_verdicts_total{verdict="held"}': nic["held_packets"],
            'coloebpf_holding_time_seconds_bucket{le="+Inf"}': nic["holding_ns"]["count"],
            "coloebpf_held_packets": 0,
        }
        return {name: prometheus.value(name) for name in wanted} == wanted

    prometheus.wait(same)
    assert sum(counters(lab)["holding_buckets"]) == counters(lab)["holding_ns"]["count"] > 0


def test_the_scrape_is_sound(prometheus: Prometheus) -> None:
    def up() -> bool:
        targets = prometheus.ask("targets")["activeTargets"]
        return [(target["health"], target["lastError"]) for target in targets] == [("up", "")] * 2

    prometheus.wait(up)  # a scrape may take longer than it has on a busy machine


def test_the_running_service_is_scraped(prometheus: Prometheus) -> None:
    prometheus.wait(lambda: prometheus.value('coloebpf_pair_state{job="service",state="lockstep"}') == 1)
    assert (prometheus.value('sum(coloebpf_compared_bytes_total{job="service"})') or 0) >= SIZE


def test_every_name_arrives(prometheus: Prometheus) -> None:
    there = set(prometheus.ask("label/__name__/values"))
    assert exprs.exported().keys() - there == set()


def test_the_rules_run_and_find_what_the_status_says(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        (group,) = prometheus.ask("rules")["groups"]
        return list(group["rules"])

    assert [rule["name"] for rule in rules()] == exprs.alerts()
    prometheus.wait(lambda: all(rule["health"] == "ok" for rule in rules()))

    def found() -> bool:
        states = {rule["name"]: rule["state"] for rule in rules()}
        quiet = states["ColoebpfPairHalted"] == states["ColoebpfDown"] == "inactive"
        return quiet and states["ColoebpfHeartbeatPathLost"] in ("pending", "firing")

    prometheus.wait(found)  # the rules may have been asked before the first scrape


@pytest.mark.parametrize("expression", exprs.dashboard_expressions())
def test_the_dashboards_questions_are_answered(prometheus: Prometheus, expression: str) -> None:
    for variable, value in (("$__rate_interval", "10s"), ("$instance", ".*"), ("$pair", ".*")):
        expression = expression.replace(variable, value)
    prometheus.ask("query", query=expression)
