"""The table of what is not TCP: what each VM sends, equal and unequal."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import (
    HBHOptUnknown,
    ICMPv6EchoReply,
    ICMPv6PacketTooBig,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
)
from scapy.packet import Raw

from tests.lab.talk import KINDS, Talk

Frames = Callable[[Talk], Sequence[bytes]]
DATA = bytes(range(256)) * 16
EXTENSIONS = [IPv6ExtHdrHopByHop(), IPv6ExtHdrDestOpt(), IPv6ExtHdrRouting(addresses=[])]
OPTIONS = b"\x94\x04\0\0"  # router alert


@dataclass(frozen=True)
class Row:
    """What each VM sends; `kinds` it is tried with."""

    name: str
    pvm: Frames
    svm: Frames
    kinds: tuple[str, ...] = tuple(KINDS)


V4 = ("v4", "v4-q")
V6 = ("v6", "v6-ad-q")


def echo(t: Talk, data: bytes, **fields: int) -> bytes:
    """An answer to a ping; the id sets the conversation apart."""
    if t.family == 4:
        return bytes(t.ip() / ICMP(type=0, id=t.guest_port, **fields) / Raw(data))
    return bytes(t.ip() / ICMPv6EchoReply(id=t.guest_port, data=data, **fields))


def error(t: Talk, quoted: bytes, code: int = 3) -> bytes:
    if t.family == 4:
        return bytes(t.ip() / ICMP(type=3, code=code) / IP(bytes(t.ip(False) / UDP() / Raw(quoted))[14:]))
    return bytes(t.ip() / ICMPv6PacketTooBig(mtu=1200 + code) / Raw(quoted * 4))


def fragments(t: Talk, body: bytes, *borders: int, number: int = 1, proto: int = 17) -> list[bytes]:
    """`body` (everything behind the IP header) in fragments that end at `borders`, multiples of 8."""
    edges, found = [0, *borders, len(body)], []
    for a, b in itertools.pairwise(edges):
        if t.family == 4:
            header = t.ip(id=number, frag=a // 8, flags="MF" if b < len(body) else 0, proto=proto)
        else:
            header = t.ip() / IPv6ExtHdrFragment(id=number, offset=a // 8, m=int(b < len(body)), nh=proto)
        found.append(bytes(header / Raw(body[a:b])))
    return found


def big(t: Talk, data: bytes) -> bytes:
    """A UDP header and its data, to be cut into fragments."""
    return struct.pack("!HHHH", t.guest_port, t.client_port, 8 + len(data), 0x1234) + data


EQUAL = [
    Row("udp", lambda t: [t.udp(DATA[:300])], lambda t: [t.udp(DATA[:300])]),
    Row("udp-empty", lambda t: [t.udp(b"")], lambda t: [t.udp(b"")]),
    Row("udp-one-byte", lambda t: [t.udp(b"z")], lambda t: [t.udp(b"z")]),
    Row("udp-full", lambda t: [t.udp(DATA[:1440])], lambda t: [t.udp(DATA[:1440])], V4),
    Row(
        "udp-never-compared",
        lambda t: [t.udp(b"abc", ip={"id": 5, "ttl": 64})],
        lambda t: [t.udp(b"abc", ip={"id": 9, "ttl": 3, "tos": 8})],
    ),
    Row(
        "udp-reordered",
        lambda t: [t.udp(bytes([i])) for i in range(9)],
        lambda t: [t.udp(bytes([i])) for i in (4, 0, 8, 7, 1, 2, 6, 5, 3)],
    ),
    Row("udp-twins", lambda t: [t.udp(b"same")] * 3, lambda t: [t.udp(b"same")] * 3),
    Row("udp-no-checksum", lambda t: [t.udp(b"abc", chksum=0)], lambda t: [t.udp(b"abc", chksum=0)], V4),
    Row("udp-padded", lambda t: [t.udp(b"abc").ljust(90, b"\0")], lambda t: [t.udp(b"abc")]),
    Row("udp-junk-behind", lambda t: [t.udp(b"abc") + b"\1\2"], lambda t: [t.udp(b"abc") + b"\3"]),
    Row("udp-as-much-junk-behind", lambda t: [t.udp(b"abc") + b"\1\2"], lambda t: [t.udp(b"abc") + b"\3\4"]),
    Row("udp-more-junk-behind", lambda t: [t.udp(b"abc") + b"\1\2"], lambda t: [t.udp(b"abc") + b"\3\4\5"]),
    Row("udp-svm-junk-behind", lambda t: [t.udp(b"abc")], lambda t: [t.udp(b"abc") + b"\3\4\5"]),
    Row("ping", lambda t: [echo(t, DATA[:56])], lambda t: [echo(t, DATA[:56])]),
    Row("ping-empty", lambda t: [echo(t, b"")], lambda t: [echo(t, b"")]),
    Row(
        "pings",
        lambda t: [echo(t, DATA[:56], seq=i) for i in range(5)],
        lambda t: [echo(t, DATA[:56], seq=i) for i in (4, 1, 3, 2, 0)],
    ),
    Row("icmp-error", lambda t: [error(t, b"q" * 99)], lambda t: [error(t, b"q" * 99)]),
    Row("gre", lambda t: [t.raw(47, DATA[:333])], lambda t: [t.raw(47, DATA[:333])]),
    Row("sctp", lambda t: [t.raw(132, DATA[:77])], lambda t: [t.raw(132, DATA[:77], ttl=3)]),
    Row("esp-tiny", lambda t: [t.raw(50, b"1")], lambda t: [t.raw(50, b"1")]),
    Row("no-next-header", lambda t: [t.raw(59, b"")], lambda t: [t.raw(59, b"")], V6),
    Row(
        "fragments-alike",
        lambda t: fragments(t, big(t, DATA[:3000]), 1400, 2800),
        lambda t: fragments(t, big(t, DATA[:3000]), 1400, 2800, number=7),
    ),
    Row(
        "fragments-cut-otherwise",
        lambda t: fragments(t, big(t, DATA[:3000]), 1400, 2800),
        lambda t: fragments(t, big(t, DATA[:3000]), 8, 800, 2000, number=7),
    ),
    Row(
        "fragments-two",
        lambda t: fragments(t, big(t, DATA[:1500]), 1400),
        lambda t: fragments(t, big(t, DATA[:1500]), 1000, number=7),
    ),
    Row(
        "fragments-svm-backwards",
        lambda t: fragments(t, big(t, DATA[:3000]), 1400, 2800),
        lambda t: fragments(t, big(t, DATA[:3000]), 1000, 2000, number=7)[::-1],
    ),
    Row(
        "fragments-pvm-backwards",
        lambda t: fragments(t, big(t, DATA[:3000]), 1400, 2800)[::-1],
        lambda t: fragments(t, big(t, DATA[:3000]), 1000, 2000, number=7),
    ),
    Row(
        "fragments-of-two-mixed",
        lambda t: [
            f
            for pair in zip(
                fragments(t, big(t, DATA[:2500]), 1400, number=3),
                fragments(t, big(t, DATA[1:2501]), 1400, number=4),
                strict=True,
            )
            for f in pair
        ],
        lambda t: (
            fragments(t, big(t, DATA[1:2501]), 1200, number=9) + fragments(t, big(t, DATA[:2500]), 1208, number=8)
        ),
    ),
    Row(
        "fragments-of-icmp",
        lambda t: fragments(t, DATA[:2000], 1400, proto=1),
        lambda t: fragments(t, DATA[:2000], 1200, proto=1, number=2),
        V4,
    ),
    Row(
        "fragments-of-tcp",
        lambda t: fragments(t, DATA[:2000], 1400, proto=6),
        lambda t: fragments(t, DATA[:2000], 1200, proto=6, number=2),
    ),
    Row(
        "atomic-fragment",
        lambda t: [bytes(t.ip() / IPv6ExtHdrFragment(id=1) / UDP(sport=t.guest_port) / Raw(b"abc"))],
        lambda t: [bytes(t.ip() / IPv6ExtHdrFragment(id=2) / UDP(sport=t.guest_port) / Raw(b"abc"))],
        V6,
    ),
    Row("ipv6-whole-chain", lambda t: [ext(t).udp(b"abc")], lambda t: [ext(t).udp(b"abc")], V6),
    Row("ip4-options", lambda t: [opt(t).udp(b"abc")], lambda t: [opt(t).udp(b"abc")], V4),
    Row("ip4-options-tcp", lambda t: [opt(t).tcp(1, b"abc")], lambda t: [opt(t).tcp(1, b"abc")], V4),
    Row("ipv6-chain-of-icmp", lambda t: [echo(ext(t), b"abc")], lambda t: [echo(ext(t), b"abc")], V6),
    Row("ipv6-long-chain", lambda t: [long(t, b"abc")], lambda t: [long(t, b"abc")], V6),
    Row(
        "ipv6-fragments-behind-options",
        lambda t: fragments(dst(t, b"a"), big(t, DATA[:2000]), 1200),
        lambda t: fragments(dst(t, b"a"), big(t, DATA[:2000]), 1200),
        V6,
    ),
    Row("bad-version", lambda t: [mangled(t, 0, 0x55)], lambda t: [mangled(t, 0, 0x55)], ("v4",)),
    Row("bad-header-length", lambda t: [mangled(t, 0, 0x41)], lambda t: [mangled(t, 0, 0x41)], ("v4",)),
    Row("length-beyond-the-frame", lambda t: [mangled(t, 2, 0x0F)], lambda t: [mangled(t, 2, 0x0F)], ("v4",)),
    Row("cut-off", lambda t: [t.udp(DATA[:100])[:40]], lambda t: [t.udp(DATA[:100])[:40]]),
    Row("udp-length-lies", lambda t: [t.udp(b"abcd", len=900)], lambda t: [t.udp(b"abcd", len=900)]),
    Row("udp-length-too-small", lambda t: [t.udp(b"abcd", len=3)], lambda t: [t.udp(b"abcd", len=3)]),
    Row("tcp-offset-lies", lambda t: [t.tcp(1, b"abcd", dataofs=15)], lambda t: [t.tcp(1, b"abcd", dataofs=15)]),
    Row("tcp-offset-too-small", lambda t: [t.tcp(1, b"abcd", dataofs=4)], lambda t: [t.tcp(1, b"abcd", dataofs=4)]),
    Row(
        "other-type",
        lambda t: [bytes(t.link(t.wire.nics[0].mac, t.wire.client_mac))[:-2] + b"\x88\xb5" + DATA[:60]],
        lambda t: [bytes(t.link(t.wire.nics[0].mac, t.wire.client_mac))[:-2] + b"\x88\xb5" + DATA[:60]],
    ),
    Row(
        "llc",
        lambda t: [bytes(t.link(t.wire.nics[0].mac, t.wire.client_mac))[:-2] + b"\0\x2e" + DATA[:46]],
        lambda t: [bytes(t.link(t.wire.nics[0].mac, t.wire.client_mac))[:-2] + b"\0\x2e" + DATA[:46]],
    ),
    Row("three-tags", lambda t: [tagged(t, b"abc")], lambda t: [tagged(t, b"abc")], ("v4",)),
]

UNEQUAL = [
    Row("udp-byte", lambda t: [t.udp(b"abcdef")], lambda t: [t.udp(b"abcdeF")]),
    Row("udp-shorter", lambda t: [t.udp(b"abcdef")], lambda t: [t.udp(b"abcde")]),
    Row("udp-zero-longer", lambda t: [t.udp(b"abcdef")], lambda t: [t.udp(b"abcdef\0")]),
    Row("udp-empty-or-zero", lambda t: [t.udp(b"")], lambda t: [t.udp(b"\0")]),
    Row("udp-swapped", lambda t: [t.udp(b"11112222")], lambda t: [t.udp(b"22221111")]),
    Row("udp-behind-its-length", lambda t: [t.udp(b"abcdXXXX", len=12)], lambda t: [t.udp(b"abcdYYYY", len=12)]),
    Row("udp-something-behind-its-length", lambda t: [t.udp(b"abcdXXXX", len=12)], lambda t: [t.udp(b"abcd")]),
    Row("ping-data", lambda t: [echo(t, b"abcdefgh")], lambda t: [echo(t, b"abcdefgH")]),
    Row("ping-seq", lambda t: [echo(t, b"abcdefgh", seq=1)], lambda t: [echo(t, b"abcdefgh", seq=2)]),
    Row("icmp-code", lambda t: [error(t, b"q" * 99)], lambda t: [error(t, b"q" * 99, code=1)]),
    Row("gre-byte", lambda t: [t.raw(47, b"abcd")], lambda t: [t.raw(47, b"abce")]),
    Row("gre-length", lambda t: [t.raw(47, b"abcd\0")], lambda t: [t.raw(47, b"abcd")]),
    Row(
        "fragments-byte",
        lambda t: fragments(t, big(t, DATA[:3000]), 1400, 2800),
        lambda t: fragments(t, big(t, DATA[:2500] + b"!" + DATA[2501:3000]), 1400, 2800),
    ),
    Row(
        "fragments-length",
        lambda t: fragments(t, big(t, bytes(3000)), 1400, 2800),
        lambda t: fragments(t, big(t, bytes(3000)) + b"\0", 1400, 2800),
    ),
    Row("ip4-options", lambda t: [opt(t).udp(b"abc")], lambda t: [opt(t, b"\x94\x04\0\1").udp(b"abc")], V4),
    Row("ip4-options-or-none", lambda t: [opt(t).udp(b"abc")], lambda t: [t.udp(b"abc")], V4),
    Row("ip4-options-on-the-svm", lambda t: [t.udp(b"abc")], lambda t: [opt(t).udp(b"abc")], V4),
    Row("ip4-options-of-tcp", lambda t: [opt(t).tcp(1, b"abc")], lambda t: [opt(t, b"\1\1\1\0").tcp(1, b"abc")], V4),
    Row("ip4-options-of-gre", lambda t: [opt(t).raw(47, b"abc")], lambda t: [t.raw(47, b"abc")], V4),
    Row("ipv6-chain-or-none", lambda t: [ext(t).udp(b"abc")], lambda t: [t.udp(b"abc")], V6),
    Row("ipv6-options", lambda t: [dst(t, b"a").udp(b"abc")], lambda t: [dst(t, b"b").udp(b"abc")], V6),
    Row("ipv6-long-chain", lambda t: [long(t, b"abc")], lambda t: [long(t, b"abc", b"!")], V6),
    Row(
        "ipv6-fragments-behind-options",
        lambda t: fragments(dst(t, b"a"), big(t, DATA[:2000]), 1200),
        lambda t: fragments(dst(t, b"b"), big(t, DATA[:2000]), 1200),
        V6,
    ),
    Row(
        "ipv4-fragments-with-options",
        lambda t: fragments(opt(t), big(t, DATA[:2000]), 1200),
        lambda t: fragments(opt(t, b"\1\1\1\0"), big(t, DATA[:2000]), 1200),
        V4,
    ),
    Row("tcp-offset-lies", lambda t: [t.tcp(1, b"abcd", dataofs=15)], lambda t: [t.tcp(1, b"abce", dataofs=15)]),
    Row("cut-off", lambda t: [t.udp(DATA[:100])[:45]], lambda t: [t.udp(DATA[:100])[:44]]),
    Row(
        "other-type",
        lambda t: [bytes(t.link(t.wire.nics[0].mac, t.wire.client_mac))[:-2] + b"\x88\xb5" + DATA[:60]],
        lambda t: [bytes(t.link(t.wire.nics[0].mac, t.wire.client_mac))[:-2] + b"\x88\xb5" + DATA[:59] + b"!"],
    ),
]


def ext(t: Talk) -> Talk:
    return Talk(t.wire, t.family, t.tags, guest_port=t.guest_port, extensions=EXTENSIONS)


def opt(t: Talk, options: bytes = OPTIONS) -> Talk:
    return Talk(t.wire, t.family, t.tags, guest_port=t.guest_port, ip_options=options)


def dst(t: Talk, text: bytes) -> Talk:
    """With a destination option of an unknown kind that says `text`."""
    header = IPv6ExtHdrDestOpt(options=[HBHOptUnknown(otype=0x3E, optdata=text)])
    return Talk(t.wire, t.family, t.tags, guest_port=t.guest_port, extensions=[header])


def long(t: Talk, data: bytes, last: bytes = b".") -> bytes:
    """A datagram behind more bytes of options than go into a flow's key; they end with `last`."""
    return dst(t, DATA[:150] + last).udp(data)


def mangled(t: Talk, at: int, value: int) -> bytes:
    """A UDP frame with one byte of its IP header changed."""
    frame = bytearray(t.udp(DATA[:50]))
    frame[14 + at] = value
    return bytes(frame)


def tagged(t: Talk, data: bytes) -> bytes:
    tags = Talk(t.wire, tags=[("ad", 5), ("q", 6), ("q", 7)], guest_port=t.guest_port)
    return tags.udp(data)


def pairs(rows: Sequence[Row]) -> list[object]:
    return [pytest.param(row, kind, id=f"{row.name}-{kind}") for row in rows for kind in row.kinds]
