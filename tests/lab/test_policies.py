"""Who may speak, and what passes uncompared: policies of ARP, ND and other types, exemptions, foreign sources."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from scapy.layers.inet6 import (
    ICMPv6ND_NA,
    ICMPv6ND_NS,
    IPv6,
)
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from coloebpf.model import Policy
from tests.lab.heard import same_frames
from tests.lab.talk import KINDS, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _clean(wire: Wire) -> Iterator[None]:
    yield
    wire.clean()


def arp(wire: Wire) -> bytes:
    nic = wire.nics[0]
    return bytes(
        Ether(src=nic.mac, dst="ff:ff:ff:ff:ff:ff") / ARP(hwsrc=nic.mac, psrc=nic.guest_v4, pdst=nic.client_v4)
    )


def solicit(wire: Wire) -> bytes:
    nic = wire.nics[0]
    return bytes(
        Ether(src=nic.mac, dst="33:33:ff:00:00:01")
        / IPv6(src=nic.guest_v6, dst="ff02::1:ff00:1", hlim=255)
        / ICMPv6ND_NS(tgt=nic.client_v6)
    )


def advertise(wire: Wire) -> bytes:
    nic = wire.nics[0]
    return bytes(
        Ether(src=nic.mac, dst=wire.client_mac)
        / IPv6(src=nic.guest_v6, dst=nic.client_v6, hlim=255)
        / ICMPv6ND_NA(tgt=nic.guest_v6)
    )


def loopback(wire: Wire) -> bytes:
    return bytes(Ether(src=wire.nics[0].mac, dst=wire.client_mac, type=0x9000) / Raw(b"0" * 60))


@pytest.mark.parametrize(("kind", "build"), [("arp", arp), ("nd", solicit), ("nd", advertise), ("other", loopback)])
@pytest.mark.parametrize("policy", list(Policy))
def test_policies(wire: Wire, kind: str, build: Callable[[Wire], bytes], policy: Policy) -> None:
    frame, before = build(wire), wire.nic()
    wire.set_policy(**{kind: policy})
    try:
        wire.pvm(frame)
        alone = wire.released(1 if policy == Policy.PASS else None)
        wire.svm(frame)
        both = alone + wire.released(1 if policy == Policy.COMPARE else None)
    finally:
        wire.set_policy(arp=Policy.PASS, nd=Policy.PASS, other=Policy.COMPARE)
    change = wire.nic().since(before)
    assert len(alone) == (policy == Policy.PASS)
    assert len(both) == (policy != Policy.DROP)
    assert change["policy_passed"] == (policy == Policy.PASS)
    assert change["dropped.policy"] == (policy == Policy.DROP)
    assert change["compared_packets"] == (policy == Policy.COMPARE)
    assert (change["held"], change["parked"]) == (0, 0)


def test_arp_and_nd_pass_by_default_and_the_svms_do_not(wire: Wire) -> None:
    wire.svm(arp(wire), solicit(wire), advertise(wire))
    assert wire.seen() == []
    for frame in (arp(wire), solicit(wire), advertise(wire)):
        wire.pvm(frame)
        assert [f.hex() for f in wire.released(1)] == [frame.hex()]


# ---- who may speak ----


@pytest.mark.parametrize("node", ["pvm", "svm"])
def test_a_foreign_source_is_dropped(wire: Wire, node: str) -> None:
    talk, before = Talk(wire), wire.nic()
    frame = bytearray(talk.udp(b"abc"))
    frame[11] ^= 1
    wire.send(node, bytes(frame))
    assert wire.seen() == []
    change = wire.nic().since(before)
    assert (change["dropped.foreign_mac"], change["held"], change["parked"]) == (1, 0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_exemptions(wire: Wire, kind: str) -> None:
    """What an operator exempts passes at once and is counted apart; its neighbours are compared."""
    exempt, other = Talk(wire, **KINDS[kind]), Talk(wire, **KINDS[kind])
    remote = "10.77.0.0/24" if exempt.family == 4 else "fd77::/16"
    control, before = wire.control["primary"], wire.nic()
    control.exempt_add(17, exempt.guest_port, remote)
    try:
        wire.svm(exempt.udp(b"1"))
        wire.pvm(exempt.udp(b"2"))
        same_frames(wire.released(1), [exempt.udp(b"2")])
        wire.pvm(other.udp(b"3"), exempt.tcp(1, b"4"))
        assert wire.seen() == []
        change = wire.nic().since(before)
        assert (change["exempt"], change["held"], change["parked"]) == (1, 2, 0)
    finally:
        assert control.exempt_del(17, exempt.guest_port, remote)
    wire.pvm(exempt.udp(b"5"))
    assert wire.seen() == []
    wire.checkpoint()
    wire.released(3)


@pytest.mark.parametrize(
    ("proto", "port", "remote", "hit"),
    [
        (6, 0, "0.0.0.0/0", True),
        (6, 0, "10.77.0.1/32", True),
        (6, 0, "10.77.0.2/32", False),
        (6, 0, "10.0.0.0/8", True),
        (17, 0, "10.0.0.0/8", False),
        (6, 1, "10.0.0.0/8", False),
        (6, 0, "::/0", None),
    ],
)
def test_an_exemption_is_no_wider_than_it_says(
    wire: Wire, proto: int, port: int, remote: str, hit: bool | None
) -> None:
    if hit is None:
        pytest.skip("::/0 covers mapped IPv4 too or not: not specified")
    talk, control = Talk(wire), wire.control["primary"]
    control.exempt_add(proto, port, remote)
    try:
        wire.pvm(talk.tcp(1, b"abc"))
        assert len(wire.released(1 if hit else None)) == hit
    finally:
        control.exempt_del(proto, port, remote)
        wire.checkpoint()
        wire.settle()
        wire.seen()


def test_an_exemption_of_one_nic_is_not_anothers(wire: Wire) -> None:
    talk, control = Talk(wire), wire.control["primary"]
    control.exempt_add(17, 0, "0.0.0.0/0", nic=1)
    try:
        wire.pvm(talk.udp(b"abc"))
        assert wire.seen() == []
    finally:
        control.exempt_del(17, 0, "0.0.0.0/0", nic=1)
        wire.svm(talk.udp(b"abc"))
    same_frames(wire.released(1), [talk.udp(b"abc")])
