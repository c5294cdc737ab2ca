"""Several guest NICs over one forward device: a VLAN id for each, and nothing else gets in."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Raw

from tests.lab.conftest import LabMaker
from tests.lab.heard import same_frames
from tests.lab.talk import KINDS, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def wire(make_module_lab: LabMaker) -> Iterator[Wire]:
    wire = Wire(make_module_lab(guests="none", nics=2, vlan=True).plan)
    for nic in (0, 1):
        wire.pvm(Talk(wire, nic=nic).tcp(1), nic=nic)  # the switch learns where the guest is
    wire.clean()
    wire.checkpoint()
    wire.seen()
    yield wire
    wire.close()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nic", [0, 1])
def test_each_nic_is_compared_on_its_own(wire: Wire, nic: int, kind: str) -> None:
    talk, before = Talk(wire, nic=nic, **KINDS[kind]), wire.nic(nic)
    for frame in (talk.tcp(1, b"answer"), talk.udp(b"answer")):
        wire.pvm(frame, nic=nic)
        assert wire.seen() == []
        wire.svm(frame, nic=nic)
        same_frames(wire.released(1), [frame])
        wire.svm(talk.udp(b"ahead"), nic=nic)
        wire.pvm(talk.udp(b"ahead"), nic=nic)
        same_frames(wire.released(1), [talk.udp(b"ahead")])
    assert wire.nic(nic).since(before)["compared_packets"] == 4


def test_one_nics_output_proves_nothing_on_the_other(wire: Wire) -> None:
    """The same frame but for the source; with the other NIC's source it is foreign."""
    talk = Talk(wire)
    frame, before = talk.udp(b"answer"), wire.nic(1)
    wire.pvm(frame)
    wire.svm(frame, nic=1)
    assert wire.seen() == []
    assert wire.nic(1).since(before)["dropped.foreign_mac"] == 1
    mac = bytes.fromhex(wire.nics[1].mac.replace(":", ""))
    wire.svm(frame[:6] + mac + frame[12:], nic=1)
    assert wire.seen() == []
    wire.svm(frame)
    same_frames(wire.released(1), [frame])
    wire.checkpoint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nic", [0, 1])
def test_the_client_is_heard_by_both_vms_of_the_nic(wire: Wire, nic: int, kind: str) -> None:
    frame = Talk(wire, nic=nic, **KINDS[kind]).udp(b"question", output=False)
    for node in ("pvm", "svm"):
        wire.seen(node, f"eth{nic}")
    wire.client(frame)
    for node in ("pvm", "svm"):
        assert [f.hex() for f in wire.await_frames(node, 1, f"eth{nic}")] == [frame.hex()]


@pytest.mark.parametrize("host", ["primary", "secondary"])
@pytest.mark.parametrize("tags", [[], [("q", 555)], [("q", 0)], [("ad", 100)], [("q", 102)]], ids=str)
def test_an_unknown_vlan_is_dropped_and_counted(wire: Wire, host: str, tags: list[tuple[str, int]]) -> None:
    """Straight onto the forward link, from the other host."""
    talk = Talk(wire)
    wire.pvm(talk.udp(b"answer"))
    before = wire.status(host)["unknown_link"]
    inner = talk.udp(b"answer", output=host == "primary")
    frame = Ether(inner[:12] + b"\0\0")
    frame.remove_payload()
    for kind, number in tags:
        frame = frame / (Dot1Q(vlan=number) if kind == "q" else Dot1AD(vlan=number))
    frame.lastlayer().type = 0x0800
    wire.send("secondary" if host == "primary" else "primary", bytes(frame / Raw(inner[14:])), "fwd0")
    assert wire.seen() == []
    assert wire.seen("svm") == []
    assert wire.status(host)["unknown_link"] == before + 1
    wire.svm(talk.udp(b"answer"))
    same_frames(wire.released(1), [talk.udp(b"answer")])


def test_what_comes_in_by_the_link_never_reaches_the_host(wire: Wire) -> None:
    """Neither the stack nor the bridge sees a frame of the forward link."""
    talk = Talk(wire)
    wire.seen("primary", "br0")
    wire.svm(talk.udp(b"answer"))
    assert wire.seen("primary", "br0") == []
    assert wire.seen() == []
    wire.checkpoint()
