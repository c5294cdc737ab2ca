"""Which runs share a lab."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Self

import pytest

from tests.bench.errors import BenchError
from tests.bench.feeder import Run
from tests.bench.suite import Effort, Suite
from tests.bench.workloads import LOCK_STEP, TCP_64, Workload

TABLE = 250  # flows that a lab's table takes
MANY = Workload("many", True, 64, 100)  # so three runs in one lab are too many


class Lab:
    """Its table keeps the flows of every run, as established connections are."""

    def __init__(self) -> None:
        self.flows = 0
        self.up = False

    def __enter__(self) -> Self:
        self.up = True
        return self

    def __exit__(self, *_: object) -> None:
        self.up = False

    def ports(self) -> Lab:
        return self

    def programs(self, _host: str) -> dict[str, int]:
        return {}

    def check(self) -> None:
        if self.flows > TABLE:
            raise BenchError("full")


class Feeder:
    def closed(self, lab: Lab, workload: Workload, *_: Any, **__: Any) -> Run:
        assert lab.up
        lab.flows += workload.flows
        counts = dict.fromkeys(("seconds", "pps", "packets", "sent", "busy_s"), 1)
        nothing = ("stalled", "lost", "reordered", "duplicates", "notified", "user_s", "own_user_s")
        return Run(counts | dict.fromkeys(nothing, 0), dict.fromkeys(("P2_runs", "P2_ns", "P4_runs", "P4_ns"), 1))


@pytest.fixture
def suite() -> Iterator[Suite]:
    shared: Any = Lab()
    labs: Any = Lab
    feeder: Any = Feeder()
    with shared:
        yield Suite(feeder, shared, shared, labs, Effort(0, 3))


def test_a_run_of_many_flows_finds_an_empty_table(suite: Suite) -> None:
    assert suite.many(MANY, LOCK_STEP).runs == 6


def test_a_full_table_is_no_measurement(suite: Suite) -> None:
    with pytest.raises(BenchError, match="full"):
        suite.lab(TCP_64, LOCK_STEP)
