"""What the project set itself, and how far the measurements are from it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from tests.bench.results import Results
from tests.bench.rows import Throughput
from tests.bench.suite import BRIDGE, LAB, PEER
from tests.bench.workloads import MANY, TCP_64, TCP_ONE, UDP_ONE

SAME_TRAFFIC = {MANY[0].name: TCP_ONE.name, MANY[1].name: UDP_ONE.name}  # 100,000 flows and one flow of it


@dataclass(frozen=True)
class Aim:
    """A bound, and the worst of the figures that it bounds."""

    what: str
    bound: float
    at_most: bool
    measured: float
    where: str

    @property
    def met(self) -> bool:
        """Whether the worst figure keeps the bound."""
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound


def aims(results: Results) -> list[Aim]:
    """Each aim of which something was measured."""
    found = (_cpu(results), _latency(results), _rate(results), _many(results), _order(results))
    return [aim for aim in found if aim]


def _worst(what: str, bound: float, figures: Iterator[tuple[float, str]], *, at_most: bool = True) -> Aim | None:
    values = list(figures)
    if not values:
        return None
    measured, where = max(values) if at_most else min(values)
    return Aim(what, bound, at_most, measured, where)


def _cpu(results: Results) -> Aim | None:
    def ratios() -> Iterator[tuple[float, str]]:
        for row in results.of(LAB):
            peer = results.rate(PEER, row.workload, row.order)
            if row.workload == TCP_64.name and peer and peer.cpu_us and row.cpu_us:
                yield row.cpu_us / peer.cpu_us, row.order

    return _worst(f"CPU of P2 and P4 per packet over colo-compare's ({TCP_64.name})", 0.1, ratios())


def _latency(results: Results) -> Aim | None:
    def ratios() -> Iterator[tuple[float, str]]:
        for row in results.latency:
            bridge, peer = (results.delay(system, row.workload, row.pace) for system in (BRIDGE, PEER))
            if row.system == LAB and bridge and peer:
                yield (row.p50_us - bridge.p50_us) / peer.p50_us, f"{row.workload}, {row.pace}"

    return _worst("added latency p50 over colo-compare's", 0.2, ratios())


def _rate(results: Results) -> Aim | None:
    def ratios() -> Iterator[tuple[float, str]]:
        for row in results.of(LAB):
            if bridge := results.rate(BRIDGE, row.workload):
                yield row.pps / bridge.pps, f"{row.workload}, {row.order}"

    return _worst("packets/s over the plain bridge's", 0.5, ratios(), at_most=False)


def _many(results: Results) -> Aim | None:
    def ratios() -> Iterator[tuple[float, str]]:
        for row in results.of(LAB):
            one = results.rate(LAB, SAME_TRAFFIC.get(row.workload, ""), row.order)
            if one and one.cpu_us and row.cpu_us:
                yield row.cpu_us / one.cpu_us, f"{row.workload}, {row.order}"

    return _worst("CPU of P2 and P4 per packet, 100,000 flows over one", 1.2, ratios())


def _order(results: Results) -> Aim | None:
    rows = [row for row in results.of(LAB) if _wrong(row)]
    late = [row for row in results.latency if row.system == LAB and row.reordered + row.lost]
    if not results.of(LAB):
        return None
    wrong = sum(map(_wrong, rows)) + sum(row.reordered + row.lost for row in late)
    where = ", ".join(
        dict.fromkeys([f"{r.workload}, {r.order}" for r in rows] + [f"{r.workload}, {r.pace}" for r in late])
    )
    return Aim("packets out of order, lost or doubled", 0, True, wrong, where or "all runs")


def _wrong(row: Throughput) -> int:
    return row.reordered + row.lost + row.duplicates
