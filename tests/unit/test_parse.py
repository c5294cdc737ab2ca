"""What parse() finds in a frame, seen in the flow that it makes: whose it is, and which range of it is compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv6Address
from socket import ntohs
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import (
    ICMPv6EchoRequest,
    ICMPv6ND_NS,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.layers.ipsec import AH
from scapy.layers.l2 import ARP, Dot3, Ether
from scapy.packet import Packet, Raw

from tests.unit.rig import (
    CLIENT_4,
    CLIENT_MAC,
    GUEST_4,
    GUEST_6,
    GUEST_MAC,
    OTHER_MAC,
    XDP_DROP,
    XDP_PASS,
    Rig,
    frame_of,
    tcp,
    udp,
)

pytestmark = pytest.mark.kernel

KIND_TCP, KIND_UDP, KIND_IP, KIND_FRAGMENT, KIND_FRAME = range(1, 6)  # enum kind, bpf/types.h
HELD_LAST = 4
TAG, TAG_AD = 0x1000, 0x8000
PORT, DATA = 7000, b"some payload of 25 bytes."
HELLO = UDP(sport=PORT, dport=40_000) / Raw(DATA)


@dataclass(frozen=True)
class Row:
    """A frame, and the flow key and range that it must give; `proto` 0 for whole frames."""

    name: str
    frame: Packet | bytes
    kind: int
    proto: int = 0
    length: int = len(DATA)
    start: int = 0
    flags: int = 0
    tags: tuple[int, int] = (0, 0)
    port: int = PORT
    guest: str = GUEST_4


def whole(name: str, frame: Packet | bytes) -> Row:
    """Can't be parsed: all of it is compared."""
    return Row(name, frame, KIND_FRAME, length=len(bytes(frame)), port=0, guest="::", tags=(0, 0))


def v6(layer: Packet, *chain: Packet, **ip: Any) -> Packet:
    frame = frame_of(family=6, ip=ip)
    for header in chain:
        frame = frame / header
    return frame / layer


def broken(change: Callable[[Packet], None], frame: Packet | None = None) -> bytes:
    """A frame with one field set to what it should not be."""
    made = Ether(bytes(frame if frame is not None else frame_of(layer=HELLO)))
    change(made)
    return bytes(made)


def put(layer: type[Packet], **fields: Any) -> Callable[[Packet], None]:
    def change(frame: Packet) -> None:
        for name, value in fields.items():
            setattr(frame[layer], name, value)

    return change


def fragment(data: bytes, **ip: Any) -> Packet:
    return frame_of(layer=Raw(data), ip={"proto": 17, "id": 9, **ip})


FRAGMENT_6 = v6(Raw(DATA), IPv6ExtHdrFragment(nh=17, offset=5, m=0, id=9))
ROWS = [
    Row("tcp", tcp(PORT, 99, DATA), KIND_TCP, 6, start=99),
    Row("tcp-options", tcp(PORT, 99, DATA, options=[("Timestamp", (1, 2))]), KIND_TCP, 6, start=99),
    Row("tcp-6", tcp(PORT, 99, DATA, family=6), KIND_TCP, 6, start=99, guest=GUEST_6),
    Row("udp", udp(PORT, DATA), KIND_UDP, 17),
    Row("udp-6", udp(PORT, DATA, family=6), KIND_UDP, 17, guest=GUEST_6),
    Row("udp-empty", udp(PORT, b""), KIND_UDP, 17, length=0),
    Row("padded", udp(PORT, b"ab") + bytes(16), KIND_UDP, 17, length=2),
    Row("ip-options", frame_of(layer=HELLO, ip={"options": [Raw(b"\x94\x04\0\0\1\1\1\0")]}), KIND_UDP, 17),
    Row("q", udp(PORT, DATA, tags=(("q", 5),)), KIND_UDP, 17, tags=(TAG | 5, 0)),
    Row("ad-q", udp(PORT, DATA, tags=(("ad", 4094), ("q", 5))), KIND_UDP, 17, tags=(TAG | TAG_AD | 4094, TAG | 5)),
    Row(
        "q-q-6", udp(PORT, DATA, family=6, tags=(("q", 1), ("q", 0))), KIND_UDP, 17, tags=(TAG | 1, TAG), guest=GUEST_6
    ),
    Row("hop-by-hop", v6(HELLO, IPv6ExtHdrHopByHop()), KIND_UDP, 17, guest=GUEST_6),
    Row("routing-dest", v6(HELLO, IPv6ExtHdrRouting(type=4), IPv6ExtHdrDestOpt()), KIND_UDP, 17, guest=GUEST_6),
    Row("atomic-fragment", v6(HELLO, IPv6ExtHdrFragment(id=7)), KIND_UDP, 17, guest=GUEST_6),
    Row("ah", v6(HELLO, AH(nh=17, spi=1, icv=bytes(12), payloadlen=4), nh=51), KIND_UDP, 17, guest=GUEST_6),
    Row("icmp", frame_of(layer=ICMP() / Raw(DATA)), KIND_IP, 1, length=8 + len(DATA), port=0),
    Row("icmp-6", v6(ICMPv6EchoRequest(data=DATA)), KIND_IP, 58, length=8 + len(DATA), port=0, guest=GUEST_6),
    Row("esp", frame_of(layer=Raw(DATA), ip={"proto": 50}), KIND_IP, 50, port=0),
    Row("no-next-header", v6(Raw(b""), nh=59), KIND_IP, 59, length=0, port=0, guest=GUEST_6),
    Row("first-fragment", fragment(bytes(24), flags="MF"), KIND_FRAGMENT, 17, length=24, port=0),
    Row("last-fragment", fragment(DATA, frag=3), KIND_FRAGMENT, 17, start=24, flags=HELD_LAST, port=0),
    Row("fragment-6", FRAGMENT_6, KIND_FRAGMENT, 17, start=40, flags=HELD_LAST, port=0, guest=GUEST_6),
    whole("no-ip", Ether(src=GUEST_MAC, dst=CLIENT_MAC, type=0x88B5) / Raw(DATA)),
    whole("802.3", Dot3(src=GUEST_MAC, dst=CLIENT_MAC, len=25) / Raw(DATA)),
    whole("third-tag", udp(PORT, DATA, tags=(("q", 1), ("q", 2), ("q", 3)))),
    whole("ip-too-long", broken(put(IP, len=2000))),
    whole("ip-too-short", broken(put(IP, len=19))),
    whole("ip-head", broken(put(IP, ihl=4))),
    whole("ip-version", broken(put(IP, version=5))),
    whole("cut-in-ip", bytes(frame_of(layer=HELLO))[:30]),
    whole("cut-in-udp", bytes(frame_of(layer=HELLO))[:40]),
    whole("udp-too-long", broken(put(UDP, len=200))),
    whole("udp-too-short", broken(put(UDP, len=7))),
    whole("tcp-head-short", broken(put(TCP, dataofs=4), Ether(tcp(PORT, 1, DATA)))),
    whole("tcp-head-long", broken(put(TCP, dataofs=15), Ether(tcp(PORT, 1, DATA)))),
    whole("ip6-too-long", broken(put(IPv6, plen=2000), Ether(udp(PORT, DATA, family=6)))),
    whole("ip6-version", broken(put(IPv6, version=4), Ether(udp(PORT, DATA, family=6)))),
    whole("extension-too-long", broken(put(IPv6ExtHdrHopByHop, len=200), v6(HELLO, IPv6ExtHdrHopByHop()))),
    whole("seven-extensions", v6(HELLO, *[IPv6ExtHdrDestOpt() for _ in range(7)])),
    whole("empty-fragment", frame_of(ip={"proto": 17, "frag": 3})),
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_frame_gives_this_flow_and_this_range(rig: Rig, row: Row) -> None:
    got = rig.arrive(bytes(row.frame))
    assert got.verdict == XDP_PASS
    key = rig.flow(got.flow).key
    guest = IPv6Address(bytes(key.guest))
    seen = (
        key.kind,
        key.proto,
        ntohs(key.guest_port),
        tuple(key.vlan),
        str(guest.ipv4_mapped or guest),
        got.start,
        got.length,
        got.flags & HELD_LAST,
    )
    assert seen == (row.kind, row.proto, row.port, row.tags, row.guest, row.start, row.length, row.flags)


# BPF_PROG_TEST_RUN of newer kernels takes no sk_buff that ends within its IP header; such frames come in tests/lab.
@pytest.mark.parametrize("row", [row for row in ROWS if row.name != "cut-in-ip"], ids=lambda row: row.name)
def test_both_hosts_see_the_same_flow(rig: Rig, row: Row) -> None:
    """P2 parses a copy in a slot, P3 the packet itself."""
    frame, before = bytes(row.frame), rig.counters()
    arrived = rig.arrive(frame)
    rig.output(frame)
    assert rig.since(before) == {"held_packets": 1}
    flow = rig.flow(arrived.flow)
    assert flow.p_count == 1, "held in another flow"
    assert rig.held(flow.p_head).digest == arrived.digest


def test_what_is_compared_of_icmp_is_not_its_checksum(rig: Rig) -> None:
    """It covers the identification of nothing else, and a guest may leave it to the device."""
    digests = {rig.arrive(bytes(frame_of(layer=ICMP(chksum=c) / Raw(DATA)))).digest for c in (0, 1, 0xFFFF)}
    assert len(digests) == 1
    assert rig.arrive(bytes(frame_of(layer=ICMP(id=1) / Raw(DATA)))).digest not in digests


NEVER_COMPARED: dict[str, dict[str, Any]] = {
    "id": {"id": 77},
    "ttl": {"ttl": 3},
    "tos": {"tos": 0xB8},
    "df": {"flags": "DF"},
}


@pytest.mark.parametrize("fields", NEVER_COMPARED.values(), ids=NEVER_COMPARED)
def test_header_fields_that_two_machines_differ_in(rig: Rig, fields: dict[str, Any]) -> None:
    plain, other = (rig.arrive(bytes(frame_of(layer=HELLO, ip=ip))) for ip in ({}, fields))
    assert (plain.flow, plain.digest) == (other.flow, other.digest)


SYN_OPTIONS = [("MSS", 1460), ("SAckOK", b""), ("Timestamp", (11, 0)), ("NOP", None), ("WScale", 7)]
SYN_ROWS: dict[str, tuple[list[Any], bool]] = {
    "timestamp-value": ([("MSS", 1460), ("SAckOK", b""), ("Timestamp", (99, 5)), ("NOP", None), ("WScale", 7)], True),
    "order": ([("WScale", 7), ("NOP", None), ("MSS", 1460), ("SAckOK", b""), ("Timestamp", (11, 0))], True),
    "mss": ([("MSS", 1459), *SYN_OPTIONS[1:]], False),
    "mss-high-byte": ([("MSS", 1460 + 256), *SYN_OPTIONS[1:]], False),
    "no-sack": ([SYN_OPTIONS[0], *SYN_OPTIONS[2:]], False),
    "no-timestamps": ([*SYN_OPTIONS[:2], *SYN_OPTIONS[3:]], False),
    "scale": ([*SYN_OPTIONS[:4], ("WScale", 8)], False),
    "no-scale": (SYN_OPTIONS[:3], False),
    "none": ([], False),
}


@pytest.mark.parametrize(("options", "same"), SYN_ROWS.values(), ids=SYN_ROWS)
def test_a_syn_is_equal_in_what_was_negotiated(rig: Rig, options: list[Any], same: bool) -> None:
    plain = rig.arrive(tcp(PORT, 1, flags="SA", options=SYN_OPTIONS)).digest
    assert (rig.arrive(tcp(PORT, 5, flags="SA", options=options)).digest == plain) is same, "or: the ISN is compared"


def test_flags_of_a_syn_are_compared(rig: Rig) -> None:
    assert len({rig.arrive(tcp(PORT, 1, flags=flags)).digest for flags in ("S", "SA", "SE")}) == 3


DROPPED = {
    "arp": (Ether(src=GUEST_MAC, dst=CLIENT_MAC) / ARP(psrc=GUEST_4, pdst=CLIENT_4), "svm_swallowed"),
    "neighbour": (v6(ICMPv6ND_NS(tgt="fd77::1")), "svm_swallowed"),
    "foreign-mac": (udp(PORT, DATA, macs=(OTHER_MAC, CLIENT_MAC)), "dropped.foreign_mac"),
}


@pytest.mark.parametrize(("frame", "counter"), DROPPED.values(), ids=DROPPED)
def test_svm_output_that_proves_nothing_goes_no_further(rig: Rig, frame: Packet | bytes, counter: str) -> None:
    before = rig.counters()
    assert rig.arrive(bytes(frame)).verdict == XDP_DROP
    assert rig.since(before) == {counter: 1}
