"""Everything that one run of the benchmark found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tests.bench.rows import Latency, TestRun, Throughput


@dataclass
class Results:
    """Filled row by row, so that an interrupted benchmark still has what it measured."""

    command: str
    machine: Mapping[str, str]
    floor_ns: float = 0.0
    test_runs: list[TestRun] = field(default_factory=list)
    throughput: list[Throughput] = field(default_factory=list)
    latency: list[Latency] = field(default_factory=list)

    def rate(self, system: str, workload: str, order: str | None = None) -> Throughput | None:
        """The row of this system and workload; a system that knows only one order needs none."""
        rows = (row for row in self.throughput if (row.system, row.workload) == (system, workload))
        return next((row for row in rows if order in (None, row.order)), None)

    def delay(self, system: str, workload: str, pace: str) -> Latency | None:
        """The row of this system, workload and pace."""
        rows = (row for row in self.latency if (row.system, row.workload, row.pace) == (system, workload, pace))
        return next(rows, None)

    def of(self, system: str) -> list[Throughput]:
        """All throughput rows of a system."""
        return [row for row in self.throughput if row.system == system]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
