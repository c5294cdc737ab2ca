"""`python -m tests.bench.virtual`: what lock-step costs a server in a virtual machine, in one run on one machine.

The same machine and the same clients: without protection, in lock-step, and as Remus has it, where output leaves with
checkpoints alone. For that the SVM's taps are down, so nothing is ever proven, and the engine makes checkpoints by the
clock.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from coloebpf.lab import services
from coloebpf.lab.history import History
from coloebpf.netns import inside
from tests.bench.report import table
from tests.lab.virtual_lab import VirtualLab, until, virtual_lab

CLIENTS = 8
# Requests of each kind; a checkpoint's commit releases one answer of each client.
UNPROTECTED, LOCKSTEP, PERIODIC = 20_000, 4_000, 160
INTERVALS_MS = (25, 100, 200)
HOUR_MS = 3_600_000
PATIENCE = 240  # seconds for one run of redis-benchmark
HEAD = ("mode", "request", "requests/s", "p50 ms", "p95 ms", "p99 ms", "checkpoints", "one took ms")


@dataclass(frozen=True)
class Row:
    """One run of redis-benchmark; latencies in ms."""

    mode: str
    request: str
    rate: float
    p50: float
    p95: float
    p99: float
    checkpoints: int
    took_ms: float | None  # the last checkpoint, from its request to its commit

    def cells(self) -> tuple[str, ...]:
        took = "-" if self.took_ms is None else f"{self.took_ms:.0f}"
        latencies = (f"{value:.2f}" for value in (self.p50, self.p95, self.p99))
        return (self.mode, self.request, f"{self.rate:,.0f}", *latencies, str(self.checkpoints), took)


def measure() -> Iterator[Row]:
    """All rows, in order; the lab is there for as long as this runs."""
    with virtual_lab(protected=False) as lab:
        yield from _both(lab, "unprotected", UNPROTECTED)
        services.protect(lab.plan, lab.running)
        yield from _both(lab, "lock-step", LOCKSTEP)
        _deafen(lab)
        for interval in INTERVALS_MS:
            # Two causes are a storm, and an hour without one its end: from here on checkpoints come by the clock.
            lab.reconfigure(
                f"storm_count = 2\nstorm_window_ms = {HOUR_MS}\ncalm_ms = {HOUR_MS}\nperiodic_interval_ms = {interval}"
            )
            _until_periodic(lab)
            yield from _both(lab, f"checkpoints alone, {interval} ms", PERIODIC)


def _both(lab: VirtualLab, mode: str, requests: int) -> Iterator[Row]:
    for request in ("set", "get"):
        before = lab.commits()
        rate, latencies = _benchmark(lab, request, requests)
        last = lab.pair(lab.primary)["last"]
        yield Row(mode, request.upper(), rate, *latencies, lab.commits() - before, last and last["duration_ms"])


def _benchmark(lab: VirtualLab, request: str, requests: int) -> tuple[float, tuple[float, float, float]]:
    address = lab.plan.nic_list()[0].guest_v4
    argv = ["redis-benchmark", "-h", address, "-c", str(CLIENTS), "-n", str(requests), "-t", request, "--csv"]
    with inside(lab.plan.namespace("client")):
        done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE, check=True)
    (row,) = csv.DictReader(line for line in done.stdout.splitlines() if line.startswith('"'))
    p50, p95, p99 = (float(row[f"p{part}_latency_ms"]) for part in (50, 95, 99))
    return float(row["rps"]), (p50, p95, p99)


def _deafen(lab: VirtualLab) -> None:
    lines = "".join(f"link set {tap.device} down\n" for tap in lab.plan.taps() if tap.node == lab.secondary)
    subprocess.run(["ip", "-n", lab.plan.namespace(lab.secondary), "-batch", "-"], input=lines, text=True, check=True)


def _until_periodic(lab: VirtualLab) -> None:
    """Unproven answers make the storm."""
    clients = History(lab.plan, 1, 0.0)
    clients.start()
    try:
        until(lambda: lab.pair(lab.primary)["mode"] == "periodic", "checkpoints come by the clock")
    finally:
        clients.finish()


def main() -> int:
    rows = []
    for row in measure():
        print(f"bench: {row.mode}, {row.request}: {row.rate:,.0f}/s", file=sys.stderr, flush=True)
        rows.append(row.cells())
    print(table(HEAD, rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
