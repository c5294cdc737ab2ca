"""The look at all flows in parts: each flow is seen once, whatever a part's size."""

from __future__ import annotations

import ctypes as ct

import pytest

from coloebpf import bpfsys
from tests.unit.conftest import SIZES
from tests.unit.rig import GAUGE_FLOW_TOP, Rig, next_port, udp

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
    assert parts(rig, 1) == [*range(BATCH, top, BATCH), 0]
    late = [event["flow"]["guest_port"] for event in rig.control.events(0) if event["kind"] == "timeout"]
    assert sorted(late) == ports


@pytest.mark.parametrize("runs", [2, 1000])
def test_more_runs_a_part(rig: Rig, runs: int) -> None:
    for _ in range(BATCH + 1):
        rig.output(udp(next_port(), b"alone"))
    assert parts(rig, runs) == [*range(BATCH * runs, rig.flow_top(), BATCH * runs), 0]


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


def test_places_never_used_before_are_counted_one_by_one(rig: Rig) -> None:
    """Two CPUs that make flows at once must both count: the later of two written marks may be the lower one."""
    flows, gauges, key = rig.control.fd("flows"), rig.control.fd("gauges"), ct.c_uint32(GAUGE_FLOW_TOP)
    for index in range(SIZES.flows):
        flow = rig.flow(index)
        if not flow.flags & 1:
            flow.generation = 0
            bpfsys.update(flows, ct.c_uint32(index), flow)
    top = rig.flow_top()
    try:
        bpfsys.update(gauges, key, ct.c_uint64(SIZES.flows + 7))  # other CPUs have counted theirs meanwhile
        rig.output(udp(next_port(), b"alone"))
        assert rig.flow_top() == SIZES.flows + 8
    finally:
        bpfsys.update(gauges, key, ct.c_uint64(top))
