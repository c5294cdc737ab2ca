"""How runs become rows, rows become aims, and all becomes the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.bench import report
from tests.bench.aims import aims
from tests.bench.feeder import Run
from tests.bench.results import Results
from tests.bench.rows import Hook, Latency, Throughput, hooks_of, quiet_runs, throughput
from tests.bench.suite import BRIDGE, LAB, PEER
from tests.bench.workloads import TCP_64, TCP_MANY, TCP_ONE

NOTHING_WRONG = {"lost": 0, "reordered": 0, "duplicates": 0, "notified": 0}


def run(pps: float = 1e5, foreign_user_s: float = 0.0, **counts: Any) -> Run:
    base = {"seconds": 1.0, "pps": pps, "packets": int(pps), "sent": int(pps), "busy_s": 1.0, "stalled": False}
    return Run(base | NOTHING_WRONG | {"own_user_s": 0.2, "user_s": 0.2 + foreign_user_s} | counts)


def rate(system: str, workload: str, pps: float, cpu_us: float | None = None, **counts: int) -> Throughput:
    fixed: dict[str, Any] = {
        "order": "lock-step",
        "busy_us": 5.0,
        "released": 1000,
        "stalled": 0,
        "runs": 1,
        "other_cores": 0.0,
    }
    hooks = {"P2": Hook(300, 1), "P4": Hook(400, 1)} if system == LAB else {}
    return Throughput(
        system=system, workload=workload, pps=pps, cpu_us=cpu_us, hooks=hooks, **(fixed | NOTHING_WRONG | counts)
    )


def delay(system: str, p50: float) -> Latency:
    rest: dict[str, Any] = {"p90_us": p50, "p99_us": p50, "min_us": p50, "lost": 0, "reordered": 0, "notified": 0}
    return Latency(system=system, workload=TCP_ONE.name, pace="1,000/s", p50_us=p50, **rest)


@pytest.fixture
def results() -> Results:
    machine = {"cpu": "a CPU", "kernel": "6.18", "peer": "QEMU 7.2", "commit": "abc"}
    rows = [
        rate(BRIDGE, TCP_64.name, 200_000),
        rate(PEER, TCP_64.name, 100_000, cpu_us=7.0),
        rate(LAB, TCP_64.name, 90_000, cpu_us=0.7, reordered=2, lost=1),
        rate(LAB, TCP_ONE.name, 90_000, cpu_us=0.7),
        rate(LAB, TCP_MANY.name, 90_000, cpu_us=0.77),
    ]
    delays = [delay(BRIDGE, 6.0), delay(PEER, 30.0), delay(LAB, 9.0)]
    return Results("bench", machine, throughput=rows, latency=delays)


def test_quiet_runs_are_preferred_and_noisy_ones_repeated() -> None:
    made = iter([run(foreign_user_s=0.5), run(1), run(foreign_user_s=0.5), run(2)])
    assert [r.pps for r in quiet_runs(lambda: next(made), 2)] == [1, 2]


def test_noisy_runs_are_used_when_there_are_no_others() -> None:
    assert len(quiet_runs(lambda: run(foreign_user_s=0.5), 2)) == 6


def test_a_row_takes_the_best_rate_and_sums_what_went_wrong() -> None:
    runs = [run(1e5, reordered=1), run(2e5, reordered=2), run(9e5, stalled=True, lost=5)]
    row = throughput(LAB, TCP_64, "lock-step", runs)
    assert (row.pps, row.stalled, row.runs, row.reordered, row.lost) == (2e5, 1, 3, 3, 5)
    assert row.busy_us == 5.0


def test_hooks_are_per_packet_and_without_the_accounting() -> None:
    measured = Run(run(100).counts, {"P2_ns": 50_000, "P2_runs": 200})
    assert hooks_of(measured, floor_ns=40) == {"P2": Hook(ns_per_packet=420, runs_per_packet=2)}


def test_aims(results: Results) -> None:

    assert [(aim.measured, aim.met) for aim in aims(results)] == [
        (pytest.approx(0.1), True),  # 0.7 of 7.0 us
        (pytest.approx(0.1), True),  # 9 - 6 of 30 us
        (pytest.approx(0.45), False),  # 90,000 of 200,000
        (pytest.approx(1.1), True),  # 0.77 of 0.7 us
        (3, False),  # reordered and lost
    ]


def test_nothing_measured_is_no_aim() -> None:
    assert aims(Results("bench", {})) == []


def test_report_has_every_table(results: Results) -> None:
    text = report.markdown(results)
    for title in ("Aims", "CPU per compared packet", "Hooks under traffic", "Latency"):
        assert f"## {title}" in text
    assert "**no**" in text
    widths = {len(line) for line in text.split("## Aims")[1].split("##")[0].splitlines() if line.startswith("|")}
    assert len(widths) == 1


def test_report_replaces_only_its_own_section(results: Results, tmp_path: Path) -> None:
    page = tmp_path / "measurements.md"
    page.write_text(f"# Title\n\nbefore\n\n{report.BEGIN}\nold\n{report.END}\n\nafter\n")
    report.write_into(page, "new\n")
    assert page.read_text() == f"# Title\n\nbefore\n\n{report.BEGIN}\n\nnew\n\n{report.END}\n\nafter\n"
    report.write_into(page, "newer\n")
    assert page.read_text().count("new") == 1


def test_report_makes_its_page(tmp_path: Path) -> None:
    page = tmp_path / "measurements.md"
    report.write_into(page, "new\n")
    assert page.read_text().startswith("# ")
    assert "new" in page.read_text()
