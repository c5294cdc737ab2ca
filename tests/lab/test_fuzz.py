"""Mutated frames through the devices of a bare lab: the client gets what both VMs said or a policy lets pass."""

from __future__ import annotations

import random

import pytest
from scapy.layers.inet import ICMP
from scapy.layers.inet6 import ICMPv6ND_NS, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from coloebpf.model import DROPS
from tests.lab.heard import Heard, but_acks
from tests.lab.talk import Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

FRAMES = 3000
BURST = 200  # frames between two waits: fewer than any queue on the way takes
MIN_FRAME, MAX_FRAME = 14, 1514
HEADERS = 90  # bytes that mutations are aimed at
TELLING = (0, 1, 4, 5, 6, 17, 43, 44, 51, 58, 59, 60, 0x45, 0x46, 0x60, 0x81, 0x86, 0xFF)
ND_TYPES = {130, 131, 132, 133, 134, 135, 136, 137, 143}


def template(wire: Wire, noise: random.Random) -> bytes:
    """A whole frame of some kind in a conversation of its own."""
    talk = Talk(wire, family=noise.choice((4, 6)), tags=noise.choice(((), (), [("q", 5)], [("ad", 7), ("q", 5)])))
    data = noise.randbytes(noise.choice((0, 3, 40, 400, 1300)))
    kind = noise.randrange(9)
    if kind == 0:
        return talk.tcp(noise.getrandbits(32), data, flags=noise.choice(("A", "PA", "FA", "RA", "S", "SA")))
    if kind == 1:
        return talk.tcp(5, data, options=[("Timestamp", (9, 4)), ("NOP", None), ("NOP", None)])
    if kind == 2:
        return talk.raw(50, data)
    if kind == 3:
        return bytes(talk.ip() / ICMP(id=noise.getrandbits(16)) / Raw(data)) if talk.family == 4 else talk.raw(58, data)
    if kind == 4:
        talk.extensions = [IPv6ExtHdrDestOpt(), IPv6ExtHdrFragment(offset=0, m=1, id=noise.getrandbits(32))]
        return talk.raw(17, data)
    if kind == 5:
        nic = wire.nics[0]
        neighbour = Talk(wire, family=6).ip() / ICMPv6ND_NS(tgt=nic.client_v6)
        return bytes(noise.choice((neighbour, Ether(src=nic.mac, dst="ff:ff:ff:ff:ff:ff") / ARP(pdst=nic.client_v4))))
    return talk.udp(data)


def mutated(frame: bytes, noise: random.Random) -> bytes:
    """The frame with some of its bytes, or its length, changed; its addresses stay."""
    made = bytearray(frame)
    for _ in range(noise.randrange(3)):
        at = 12 + noise.randrange(min(len(made), HEADERS) - 11)
        what = noise.randrange(6)
        if what == 0:
            made[at : at + 1] = bytes([noise.choice(TELLING)])
        elif what == 1:
            made[at : at + 2] = noise.randbytes(2)
        elif what == 2:
            del made[at + 2 :]
        elif what == 3:
            made += noise.randbytes(30)
        elif what == 4:
            made[at:at] = made[at : at + 4 * noise.randrange(10)]
        else:
            del made[at : at + 1 + noise.randrange(8)]
    made += bytes(max(MIN_FRAME - len(made), 0))
    return bytes(made[:MAX_FRAME])


def plain(frame: bytes) -> bytes:
    """The frame without what a release may lower, if it has such a thing."""
    try:
        return but_acks(frame)
    except IndexError:  # ends within its headers
        return frame


def by_policy(frame: bytes) -> bool:
    """ARP, neighbour discovery and MLD pass uncompared."""
    at, kind = 14, frame[12:14]
    for _ in range(2):
        if kind in (b"\x81\x00", b"\x88\xa8"):
            kind, at = frame[at + 2 : at + 4], at + 4
    if kind == b"\x08\x06":
        return True
    try:
        heard = Heard.of(frame)
        return heard.proto == 58 and frame[heard.l4] in ND_TYPES
    except IndexError:
        return False


def owed_ack(frame: bytes) -> bool:
    """An ACK of both VMs' numbers, which coloebpf builds itself."""
    try:
        heard = Heard.of(frame)
        return heard.proto == 6 and heard.flags == 0x10 and not heard.data
    except IndexError:
        return False


def test_mutated_frames_of_both_vms(wire: Wire) -> None:
    noise = random.Random(20)
    said = [mutated(template(wire, noise), noise) for _ in range(FRAMES)]
    twins = set(noise.sample(range(FRAMES), FRAMES // 2))
    wire.seen()

    before = wire.nic()
    for start in range(0, FRAMES, BURST):
        wire.pvm(*said[start : start + BURST])
    alone = wire.released()
    change = wire.nic().since(before)
    assert [frame.hex() for frame in alone if not by_policy(frame)] == [], "the SVM has not said a word"
    refused = sum(change[f"dropped.{name}"] for name in DROPS)
    came = change["output_packets"]
    assert FRAMES * 0.98 < came <= FRAMES, "the kernel itself drops a frame that ends within its tag"
    assert change["held_packets"] + change["policy_passed"] + refused == came, change
    assert change["held_packets"] > FRAMES // 2, "hardly a frame was held"

    for start in range(0, FRAMES, BURST):
        wire.svm(*(said[i] for i in range(start, start + BURST) if i in twins))
    both = {plain(said[i]) for i in twins}
    got = wire.released()
    wrong = [frame.hex() for frame in got if plain(frame) not in both and not by_policy(frame) and not owed_ack(frame)]
    assert wrong == [], "released, but the SVM has not said it"
    assert len(got) > len(twins) // 4, "hardly a frame was released"

    wire.checkpoint()
    rest = wire.released()
    every = {plain(frame) for frame in said}
    assert [frame.hex() for frame in rest if plain(frame) not in every and not owed_ack(frame)] == []
    nic = wire.nic()
    assert (nic["held"], nic["held_packets"]) == (0, nic["unheld_packets"])
    slots = wire.status()["slots"]
    assert slots["total"] - slots["free"] == nic["parked"]
