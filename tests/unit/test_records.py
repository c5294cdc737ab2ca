"""What is read out of the maps of a running dataplane, and what the comparer makes of its events."""

from __future__ import annotations

import ctypes as ct
import socket
from typing import Any

import pytest

from coloebpf.service.comparer import Comparer, finding_of
from coloebpf.service.records import RECORD_BYTES, MapReader
from tests.unit.conftest import SIZES
from tests.unit.rig import HELD, Rig, next_port, tcp, udp

pytestmark = pytest.mark.kernel

DATA, DATAGRAM = 1, 5  # enum held_type


def of_svm(frame: bytes) -> None:
    """The secondary sends `frame` over the forward link."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as link:
        link.bind(("fwd0p", 0))
        link.send(frame)


def events(rig: Rig) -> list[dict[str, Any]]:
    found = rig.control.events(0.2) or rig.control.events(1.0)
    return [event for event in found if event["kind"] != "kick"]


def test_a_record_is_as_long_as_the_programs_have_it(rig: Rig) -> None:
    assert HELD.size == RECORD_BYTES
    record = dict(rig.control.shapes.leaf("scratch")._fields_)["held"]
    assert HELD.size == ct.sizeof(record)


def test_a_flow_with_its_first_packets(rig: Rig) -> None:
    port, idle = next_port(), next_port()
    for data in (b"one", b"four"):
        rig.output(udp(port, data))
    rig.output(udp(idle, b"x"))
    number = next(
        i for i in range(rig.flow_top()) if socket.ntohs(rig.flow(i).key.guest_port) == port and rig.flow(i).flags
    )
    got = MapReader(rig.control).flows([number])[number]
    assert got is not None
    assert (got.pvm_count, got.svm_count, got.svm) == (2, 0, None)
    assert got.pvm is not None
    assert (got.pvm.type, got.pvm.start, got.pvm.end, got.pvm.epoch) == (DATAGRAM, 0, 3, rig.control.state(0).epoch)


def test_a_flow_that_goes_on_meanwhile_is_left_out(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    port = next_port()
    rig.output(udp(port, b"one"))
    number = next(
        i for i in range(rig.flow_top()) if socket.ntohs(rig.flow(i).key.guest_port) == port and rig.flow(i).flags
    )
    reader = MapReader(rig.control)
    look = reader._flow

    def and_then(index: int) -> Any:
        flow = look(index)
        rig.control.suspend(0)
        rig.control.commit(0)
        return flow

    monkeypatch.setattr(reader, "_flow", and_then)
    assert reader.flows([number]) == {number: None}


def test_room(rig: Rig) -> None:
    before = MapReader(rig.control).room()
    rig.output(udp(next_port(), b"x"))
    after = MapReader(rig.control).room()
    assert (after.slots, after.flows) == (SIZES.slots, SIZES.flows)
    assert (before.slots_free - after.slots_free, before.flows_free - after.flows_free) == (1, 1)


@pytest.mark.parametrize(
    ("pvm", "svm", "kind", "reason"),
    [
        ([b"from here"], [b"from there"], "divergence", "length"),
        ([b"from here"], [b"from hell"], "divergence", "payload"),
        ([b"from here"], [], "timeout", "missing_on_svm"),
        ([], [b"from here"], "timeout", "missing_on_pvm"),
    ],
)
def test_datagrams(rig: Rig, pvm: list[bytes], svm: list[bytes], kind: str, reason: str) -> None:
    port = next_port()
    parked = rig.counters()["svm_parked"] + len(svm)
    for data in pvm:
        rig.output(udp(port, data))
    for data in svm:
        of_svm(udp(port, data))
    while rig.counters()["svm_parked"] < parked:
        pass
    rig.set_timeout(1)
    rig.control.sweep()
    finding = finding_of(events(rig)[0])
    assert finding is not None
    [got] = Comparer(MapReader(rig.control), lambda: finding.time_ns).look([finding])
    assert (got.kind, got.reason, got.confirmed) == (kind, reason, True)
    assert (got.pvm, got.svm) == (len(pvm), len(svm))


def test_streams_that_differ(rig: Rig) -> None:
    port = next_port()
    rig.output(tcp(port, 1000, b"12:00:01"))
    of_svm(tcp(port, 1000, b"12:00:02"))
    [event] = events(rig)
    finding = finding_of(event)
    assert finding is not None
    [got] = Comparer(MapReader(rig.control), lambda: finding.time_ns).look([finding])
    assert (got.kind, got.reason, got.confirmed, got.pvm) == ("divergence", "payload", True, 1)
