"""The look at all flows in parts: each flow is seen once, whatever a part's size."""

from __future__ import annotations

import pytest

from coloebpf.control import TOP_SLACK
from tests.unit.rig import Rig, next_port, udp

pytestmark = pytest.mark.kernel

BATCH = 128  # SWEEP_BATCH of bpf/upkeep.c


def parts(rig: Rig, runs: int) -> list[int]:
    """Where each part of one walk ended."""
    ends = [rig.control.sweep_some(0, runs)]
    while ends[-1]:
        ends.append(rig.control.sweep_some(ends[-1], runs))
    return ends


def test_a_walk_in_parts(rig: Rig) -> None:
    ports = [next_port() for _ in range(200)]
    for port in ports:
        rig.output(udp(port, b"alone"))
    rig.set_timeout(1)
    rig.control.events(0)
    top = rig.flow_top()
    assert top > BATCH
    assert parts(rig, 1) == [*range(BATCH, top + TOP_SLACK, BATCH), 0]
    late = [event["flow"]["guest_port"] for event in rig.control.events(0) if event["kind"] == "timeout"]
    assert sorted(late) == ports


@pytest.mark.parametrize("runs", [2, 1000])
def test_more_runs_a_part(rig: Rig, runs: int) -> None:
    for _ in range(BATCH + 1):
        rig.output(udp(next_port(), b"alone"))
    assert parts(rig, runs) == [*range(BATCH * runs, rig.flow_top() + TOP_SLACK, BATCH * runs), 0]


@pytest.mark.parametrize("timeout_s", [0.0, 1.0])
def test_a_burst_of_events_in_parts(rig: Rig, timeout_s: float) -> None:
    ports = [next_port() for _ in range(25)]
    for port in ports:
        rig.output(udp(port, b"alone"))
    rig.set_timeout(1)
    rig.control.events(0)
    rig.control.sweep()
    found = [rig.control.events(timeout_s, most=10) for _ in range(3)]
    assert [len(part) for part in found] == [10, 10, 5]
    assert sorted(event["flow"]["guest_port"] for part in found for event in part) == ports


def test_a_start_behind_the_last_flow_is_the_end(rig: Rig) -> None:
    assert rig.control.sweep_some(1 << 30, 1) == 0
