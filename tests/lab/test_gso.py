"""Guests whose offloads are on: super-packets of up to 64 KiB and checksums left open."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.lab.heard import Heard, ones_sum
from tests.lab.talk import M32, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

KINDS: dict[str, dict[str, Any]] = {"v4": {}, "v6": {"family": 6}, "v4-q": {"tags": [("q", 7)]}}
TCP4, TCP6, UDP_L4 = 1, 4, 5  # VIRTIO_NET_HDR_GSO_*
STREAM = bytes((i * 31 + (i >> 8) * 7) & 0xFF for i in range(65536))
STAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (1234, 5678))]


@pytest.fixture(autouse=True)
def _clean(wire: Wire) -> Iterator[None]:
    yield
    wire.clean()
    status = wire.status()
    assert status["slots"]["free"] >= status["slots"]["total"] - 8


def open_sum(frame: bytes) -> bytes:
    """The frame as a guest with checksum offload hands it on: the pseudo-header's sum in the checksum's place."""
    heard = Heard.of(frame)
    ends = frame[heard.l3 + 8 : heard.l3 + 40] if frame[heard.l3] >> 4 == 6 else frame[heard.l3 + 12 : heard.l3 + 20]
    at = heard.l4 + (16 if heard.proto == 6 else 6)
    part = ones_sum(ends + struct.pack("!II", heard.end - heard.l4, heard.proto))
    return frame[:at] + part.to_bytes(2, "big") + frame[at + 2 :]


@dataclass
class Super:
    """One super-packet of the PVM's."""

    talk: Talk
    data: bytes
    size: int
    seq: int = 1
    flags: str = "PA"
    udp: bool = False
    ack: int = 1000
    stamps: bool = True

    def send(self) -> None:
        talk = self.talk
        options = STAMPS if self.stamps else []
        frame = (
            talk.udp(self.data, ip={"id": 500})
            if self.udp
            else talk.tcp(self.seq, self.data, flags=self.flags, ack=self.ack, options=options, ip={"id": 500})
        )
        heard, kind = Heard.of(frame), UDP_L4 if self.udp else TCP4 if talk.family == 4 else TCP6
        head = 8 if self.udp else 20 + len(heard.tcp_options)
        many = len(self.data) > self.size
        talk.wire.super_packet(
            open_sum(frame),
            self.size if many else 0,
            heard.l4,
            6 if self.udp else 16,
            kind if many else 0,
            heard.l4 + head,
        )

    @property
    def pieces(self) -> list[bytes]:
        return [self.data[i : i + self.size] for i in range(0, len(self.data), self.size)]

    def check(self, frames: list[bytes], first: int = 0) -> None:
        """Wire-sized packets from piece `first` on, as the kernel's own segmentation would make them."""
        for number, frame in enumerate(frames, first):
            heard, last = Heard.of(frame), number == len(self.pieces) - 1
            assert heard.sums_hold()
            assert frame[: heard.l3] == self.talk.udp(b"")[: heard.l3]
            if self.talk.family == 4:
                assert int.from_bytes(frame[heard.l3 + 4 : heard.l3 + 6], "big") == 500 + number
            if self.udp:
                assert frame[heard.l4 + 8 : heard.end] == self.pieces[number]
                continue
            assert heard.data == self.pieces[number]
            assert heard.seq == (self.seq + number * self.size) & M32
            wanted = {"A": 0x10, "P": 0x08, "F": 0x01, "C": 0x80}
            flags = sum(wanted[f] for f in self.flags)
            assert heard.flags == (flags if last else flags & ~0x09) & (0xFF if number == 0 else ~0x80)
            assert not self.stamps or heard.timestamps == (1234, 5678)
            assert heard.ack <= self.ack


def svm_says(talk: Talk, seq: int, data: bytes, step: int, fin: bool = False, ack: int = 1000) -> list[bytes]:
    found = [talk.tcp(seq + i, data[i : i + step], ack=ack) for i in range(0, len(data), step)]
    return [*found, talk.tcp(seq + len(data), flags="FA", ack=ack)] if fin else found


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize(
    ("length", "size"),
    [(1448 * 2, 1448), (1449, 1448), (65000, 1400), (65160, 1448), (5000, 1220), (20_000, 536), (700, 100)],
)
def test_a_super_packet_is_compared_as_the_segments_it_stands_for(
    wire: Wire, talk: Talk, length: int, size: int, first: str
) -> None:
    size -= 20 if talk.family == 6 and size > 1400 else 0
    whole = Super(talk, STREAM[:length], size)
    if -(-length // size) > 60:
        pytest.skip("more segments than a super-packet has")
    before = wire.nic()
    if first == "pvm":
        whole.send()
        assert wire.seen() == []
        assert wire.nic().since(before)["held"] == len(whole.pieces)
        wire.svm(*svm_says(talk, 1, whole.data, 1000))
    else:
        wire.svm(*svm_says(talk, 1, whole.data, 1000))
        whole.send()
    got = wire.released(len(whole.pieces))
    assert len(got) == len(whole.pieces)
    whole.check(got)
    change = wire.nic().since(before)
    assert (change["held"], change["parked"], change["compared_packets"]) == (0, 0, len(whole.pieces))
    assert {name for name in change if name.startswith(("divergences", "dropped"))} == set()


def test_what_the_svm_has_not_said_stays(wire: Wire, talk: Talk) -> None:
    whole = Super(talk, STREAM[:14_000], 1400)
    whole.send()
    for i in range(10):
        wire.svm(talk.tcp(1 + 1400 * i, STREAM[1400 * i : 1400 * (i + 1) - 1]))
        assert wire.seen() == []
        wire.svm(talk.tcp(1400 * (i + 1), STREAM[1400 * (i + 1) - 1 : 1400 * (i + 1)]))
        got = wire.released(1)
        assert len(got) == 1
        whole.check(got, i)


def test_the_svm_may_be_half_ahead(wire: Wire, talk: Talk) -> None:
    whole = Super(talk, STREAM[:14_000], 1400)
    wire.svm(*svm_says(talk, 1, STREAM[:7100], 1000))
    whole.send()
    got = wire.released(5)
    assert len(got) == 5
    whole.check(got)
    wire.svm(*svm_says(talk, 7101, STREAM[7100:14_000], 1400))
    got = wire.released(5)
    assert len(got) == 5
    whole.check(got, 5)


def test_one_other_byte_holds_what_comes_after(wire: Wire, talk: Talk) -> None:
    whole, before = Super(talk, STREAM[:14_000], 1400), wire.nic()
    other = STREAM[:5000] + b"\xff" + STREAM[5001:14_000]
    assert other != STREAM[:14_000]
    whole.send()
    wire.svm(*svm_says(talk, 1, other, 1400))
    got = wire.released(3)
    assert len(got) == 3
    whole.check(got)
    assert wire.nic().since(before)["divergences.payload"] == 1
    wire.checkpoint()
    got = wire.released(7)
    assert len(got) == 7
    whole.check(got, 3)


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize("seq", [1, 2**32 - 7000])
def test_fin_and_wrap(wire: Wire, talk: Talk, first: str, seq: int) -> None:
    whole = Super(talk, STREAM[:10_000], 1400, seq=seq, flags="FPA")
    said = svm_says(talk, seq, whole.data, 900, fin=True)
    if first == "svm":
        wire.svm(*said)
    whole.send()
    if first == "pvm":
        assert wire.seen() == []
        wire.svm(*said)
    got = wire.released(8)
    assert len(got) == 8
    whole.check(got)


@pytest.mark.parametrize("first", ["pvm", "svm"])
def test_a_super_packet_acknowledges_no_more_than_the_svm(wire: Wire, talk: Talk, first: str) -> None:
    whole = Super(talk, STREAM[:7000], 1400, ack=9000)
    said = svm_says(talk, 1, whole.data, 1400, ack=8000)
    if first == "svm":
        wire.svm(*said)
    whole.send()
    if first == "pvm":
        wire.svm(*said)
    got = wire.released(5)
    whole.check(got)
    assert {Heard.of(f).ack for f in got} == {8000}
    wire.svm(talk.tcp(7001, ack=9000))
    assert [Heard.of(f).ack for f in wire.released(1)] == [9000]


def test_super_packets_one_after_the_other(wire: Wire, talk: Talk) -> None:
    parts = [Super(talk, STREAM[i : i + 20_000], 1400, seq=1 + i) for i in (0, 20_000, 40_000)]
    for part in parts:
        part.send()
    wire.svm(*svm_says(talk, 1, STREAM[:60_000], 1460 - 40))
    got = wire.released(45)
    assert len(got) == 45
    for number, part in enumerate(parts):
        part.check(got[15 * number : 15 * number + 15])


def test_a_repeated_super_packet_of_proven_bytes_goes_out(wire: Wire, talk: Talk) -> None:
    whole = Super(talk, STREAM[:7000], 1400)
    wire.svm(*svm_says(talk, 1, whole.data, 1400))
    whole.send()
    assert len(wire.released(5)) == 5
    whole.send()
    got = wire.released(5)
    assert len(got) == 5
    whole.check(got)


def arrives_whole(wire: Wire, one: Super, first: str) -> None:
    """One packet, no segmentation, whichever VM's is the `first`: what the client gets has its bytes and a whole checksum."""
    talk = one.talk
    said = talk.udp(one.data) if one.udp else talk.tcp(1, one.data)
    if first == "svm":
        wire.svm(said)
    one.send()
    if first == "pvm":
        assert wire.seen() == []
        wire.svm(said)
    got = wire.released(1)
    assert len(got) == 1
    heard = Heard.of(got[0])
    assert heard.sums_hold()
    assert got[0][heard.l4 + 8 : heard.end] == one.data if one.udp else heard.data == one.data


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize("udp", [True, False])
@pytest.mark.parametrize("size", [0, 1, 17, 999])
def test_a_checksum_left_open_is_right_at_the_client(wire: Wire, talk: Talk, udp: bool, first: str, size: int) -> None:
    """What is held carries a whole checksum, what passes gets it from the device."""
    if not udp and not size:
        pytest.skip("a pure ACK is not compared")
    arrives_whole(wire, Super(talk, STREAM[3 : 3 + size], 1448, udp=udp), first)


def test_open_checksums_of_a_flow_that_releases_itself(wire: Wire, talk: Talk) -> None:
    """The PVM's own packet is the vessel of an older one of another length."""
    wire.svm(talk.tcp(1, STREAM[:50]), talk.tcp(51, STREAM[50:1000]))
    for seq, end in ((51, 1000), (1, 50)):  # the second fills the hole
        Super(talk, STREAM[seq - 1 : end], 1448, seq=seq).send()
    wire.svm(talk.tcp(1, STREAM[:50]))
    got = wire.released(2)
    assert all(Heard.of(f).sums_hold() for f in got)


def test_a_whole_checksum_that_looks_open(wire: Wire, talk: Talk) -> None:
    """One in 65,535 whole checksums equals the pseudo-header's sum; as a vessel such a packet must not have others completed."""
    wire.svm(talk.tcp(1, STREAM[:50], ack=9999), talk.tcp(51, STREAM[50:1000], ack=9999))
    first = talk.tcp(1, STREAM[:50], ack=1000)
    looks_open, at = open_sum(first), Heard.of(first).l4 + 16
    whole, pseudo = (int.from_bytes(frame[at : at + 2], "big") for frame in (first, looks_open))
    first = talk.tcp(1, STREAM[:50], ack=1000 + (whole - pseudo) % 0xFFFF)
    assert Heard.of(first).sums_hold()
    assert first == open_sum(first)
    wire.pvm(talk.tcp(51, STREAM[50:1000], ack=1000), first)  # the second fills the hole
    wire.svm(talk.tcp(1, STREAM[:50], ack=99_999))
    got = wire.released(2)
    assert [Heard.of(frame).sums_hold() for frame in got] == [True] * len(got)


@pytest.fixture
def optional(wire: Wire) -> Talk:
    """A conversation whose packets have an IP option: router alert."""
    return Talk(wire, ip_options=b"\x94\x04\x00\x00")


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize("udp", [True, False])
def test_a_checksum_left_open_behind_ip_options(wire: Wire, optional: Talk, udp: bool, first: str) -> None:
    arrives_whole(wire, Super(optional, STREAM[:333], 1448, udp=udp), first)


@pytest.mark.parametrize(("total", "size"), [(6500, 1400), (6400, 100)], ids=["5 segments", "64 segments"])
@pytest.mark.parametrize("first", ["pvm", "svm"])
def test_udp_super_packets(wire: Wire, talk: Talk, first: str, total: int, size: int) -> None:
    whole = Super(talk, STREAM[:total], size, udp=True)
    said = [talk.udp(piece) for piece in whole.pieces]
    if first == "svm":
        wire.svm(*said)
    whole.send()
    if first == "pvm":
        assert wire.seen() == []
        wire.svm(*said[::-1])
    got = wire.released(len(said))
    assert len(got) == len(said)
    whole.check(got)


@pytest.mark.parametrize("segments", range(20, 46))
def test_the_kernels_limit_of_tail_calls_leaves_no_owner_behind(wire: Wire, segments: int) -> None:
    """A run of as many steps as can be: wherever the calls come to their end, the flow is not left in a dead program's hands."""
    talk = Talk(wire)
    whole = Super(talk, STREAM[: 1400 * segments], 1400, seq=2)
    wire.svm(talk.tcp(1, b"a", ack=1000, options=STAMPS))
    wire.pvm(talk.tcp(1, b"a", ack=1000, options=STAMPS))
    assert len(wire.released(1)) == 1
    wire.svm(*svm_says(talk, 2, whole.data, 700))
    wire.settle()
    wire.note_work(talk.guest_port)
    whole.send()
    wire.settle()
    (flow,) = wire.flows(talk.guest_port)
    assert flow.owner == 0
    wire.kick()
    assert sum(len(Heard.of(frame).data) for frame in wire.seen()) == len(whole.data)
