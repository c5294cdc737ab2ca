"""The same byte stream, cut by each VM in its own way: random borders, overlaps, repeats, orders and interleavings."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from tests.lab.heard import Heard, but_acks
from tests.lab.talk import Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

LONGEST = 1400  # bytes of a segment
STREAM = bytes((i * 131 + (i >> 8) * 17) & 0xFF for i in range(4096))
SLOW = settings(
    deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True, print_blob=False
)

Range = tuple[int, int]


@dataclass(frozen=True)
class Script:
    """Both VMs' segments in the order of their arrival: (is the PVM's, from, to); to counts a FIN."""

    start: int
    length: int
    fin: bool
    steps: list[tuple[bool, int, int]]


def _cover(draw: Any, length: int) -> list[Range]:
    """Segments that together are the stream, none too long."""
    borders = sorted(
        {0, length, *draw(st.lists(st.integers(1, length - 1), max_size=6)), *range(LONGEST, length, LONGEST)}
    )
    return list(itertools.pairwise(borders))


def _extras(draw: Any, length: int) -> list[Range]:
    found = []
    for a, b in draw(st.lists(st.tuples(st.integers(0, length - 1), st.integers(1, 600)), max_size=3)):
        found.append((a, min(length, a + b)))
    return found


@st.composite
def scripts(draw: Any, pvm_moves: bool) -> Script:
    length = draw(st.integers(2, 3000))
    fin = draw(st.booleans())
    pvm, svm = _cover(draw, length + fin), _cover(draw, length + fin)
    for extra in _extras(draw, length):
        pvm.insert(draw(st.integers(0 if pvm_moves else len(pvm), len(pvm))), extra)
    for extra in _extras(draw, length):
        svm.insert(draw(st.integers(0, len(svm))), extra)
    if draw(st.booleans()):
        svm = draw(st.permutations(svm))
    if pvm_moves and draw(st.booleans()):
        pvm = [pvm[0], *draw(st.permutations(pvm[1:]))]  # the first one begins the stream
        pvm.sort(key=lambda r: r[0] != 0)
    elif pvm[0][0] != 0:
        pvm.sort(key=lambda r: r[0] != 0)
    turns = draw(st.permutations([True] * len(pvm) + [False] * len(svm)))
    sides = {True: iter(pvm), False: iter(svm)}
    start = draw(st.sampled_from([0, 1, 7, 100_000, 2**31 - 900, 2**32 - 1, 2**32 - 1500]))
    return Script(start, length, fin, [(turn, *next(sides[turn])) for turn in turns])


def segment(talk: Talk, script: Script, stream: bytes, a: int, b: int, number: int) -> bytes:
    fin = script.fin and b > script.length
    return talk.tcp(
        script.start + a,
        stream[a : min(b, script.length)],
        flags="FA" if fin else "A",
        ip={"id": number, "ttl": 64 - number % 2},
    )


def reach(ranges: list[Range]) -> int:
    """How far from 0 on the ranges go without a hole."""
    end = 0
    for a, b in sorted(ranges):
        if a > end:
            break
        end = max(end, b)
    return end


class Oracle:
    """Who sent what, and what may and must have been released of it."""

    def __init__(self, wire: Wire, script: Script, talk: Talk, svm_stream: bytes = STREAM) -> None:
        self.wire, self.script, self.talk, self.svm_stream = wire, script, talk, svm_stream
        self.sent: list[tuple[int, int, bytes, bool]] = []  # from, to, frame, repeats what was sent before
        self.said: list[Range] = []
        self.got: list[int] = []  # numbers in `sent`

    def step(self, pvm: bool, a: int, b: int, settle: bool) -> None:
        stream = STREAM if pvm else self.svm_stream
        frame = segment(self.talk, self.script, stream, a, b, len(self.sent) + 1 if pvm else 999)
        if pvm:
            self.sent.append((a, b, frame, b <= reach([(x, y) for x, y, *_ in self.sent])))
        else:
            self.said.append((a, b))
        if settle:
            (self.wire.pvm if pvm else self.wire.svm)(frame)
            self.look()
        else:
            self.wire.push("pvm" if pvm else "svm", frame)

    def look(self) -> None:
        """Nothing unproven is out, and no frame twice."""
        known = {but_acks(frame): number for number, (_, _, frame, _) in enumerate(self.sent)}
        for frame in self.wire.seen():
            assert Heard.of(frame).sums_hold()
            if but_acks(frame) not in known:
                self.check_part(Ether(frame)[TCP])
                continue
            number = known[but_acks(frame)]
            assert number not in self.got, f"twice: {self.sent[number][:2]}"
            assert self.sent[number][1] <= reach(self.said), f"unproven: {self.sent[number][:2]}"
            self.got.append(number)

    def check_part(self, part: TCP) -> None:
        """The proven first half of a held packet may leave while the whole waits (bpf/partial.c)."""
        data = bytes(part.payload)
        a = (part.seq - self.script.start) % (1 << 32)
        assert data
        assert a + len(data) <= reach(self.said), f"unproven: {a} to {a + len(data)}"
        assert data == STREAM[a : a + len(data)]

    def check_order(self) -> None:
        new = [number for number in self.got if not self.sent[number][3]]
        assert new == sorted(new)

    def check_progress(self) -> None:
        """Whole packets that both sent, with nothing unproven before them, must be out: they wait for nobody."""
        said = reach(self.said)
        both = reach([(a, b) for a, b, *_ in self.sent if b <= said])
        for number, (_, b, _, again) in enumerate(self.sent):
            if not again and b > both:
                break
            assert again or number in self.got, f"{self.sent[number][:2]} waits although both sent up to {both}"

    def check_end(self) -> None:
        missing = [self.sent[n][:2] for n in range(len(self.sent)) if n not in self.got]
        assert missing == []


def play(wire: Wire, script: Script, settle: bool) -> None:
    before, oracle = wire.nic(), Oracle(wire, script, Talk(wire))
    try:
        for step in script.steps:
            oracle.step(*step, settle)
            if settle:
                oracle.check_order()
                oracle.check_progress()
        wire.settle()
        oracle.look()
        oracle.check_order()
        oracle.check_end()
        change = wire.nic().since(before)
        assert (change["held"], change["parked"]) == (0, 0)
        assert {name: n for name, n in change.items() if name.startswith(("divergences", "dropped"))} == {}
    finally:
        if wire.nic().since(before)["held"]:
            wire.checkpoint()
        wire.settle()
        wire.seen()


@settings(SLOW, max_examples=120)
@given(script=scripts(pvm_moves=False))
def test_any_cuts_any_interleaving(wire: Wire, script: Script) -> None:
    play(wire, script, settle=True)


@settings(SLOW, max_examples=60)
@given(script=scripts(pvm_moves=True))
def test_the_pvm_repeats_and_reorders_too(wire: Wire, script: Script) -> None:
    play(wire, script, settle=True)


@settings(SLOW, max_examples=200)
@given(script=scripts(pvm_moves=True))
def test_all_at_once(wire: Wire, script: Script) -> None:
    """Nobody waits for anybody: the hooks of both sides run at the same time."""
    play(wire, script, settle=False)


@settings(SLOW, max_examples=60)
@given(script=scripts(pvm_moves=False), where=st.floats(0, 0.999))
def test_one_other_byte_anywhere_is_never_released(wire: Wire, script: Script, where: float) -> None:
    at = int(where * script.length)
    other = STREAM[:at] + bytes([STREAM[at] ^ 0x10]) + STREAM[at + 1 :]
    before, oracle = wire.nic(), Oracle(wire, script, Talk(wire), other)
    try:
        for step in script.steps:
            oracle.step(*step, True)
        assert all(b <= at or a > at for a, b, *_ in (oracle.sent[number] for number in oracle.got))
        change = wire.nic().since(before)
        assert {name: n for name, n in change.items() if name.startswith("divergences")} == {"divergences.payload": 1}
    finally:
        wire.checkpoint()
    wire.settle()
    oracle.look()
    oracle.check_order()
    oracle.check_end()


@pytest.mark.parametrize("flags", ["A", "FA"])
def test_no_part_leaves_that_the_svm_has_not_said(wire: Wire, talk: Talk, flags: str) -> None:
    """The SVM's piece has other bytes, which shows only when the packet's rest has come; it repeats it before."""
    wire.pvm(talk.tcp(1, b"rightdata", flags=flags))
    wire.svm(talk.tcp(1, b"wrong"))
    assert wire.seen() == []
    before = wire.nic()
    wire.svm(talk.tcp(1, b"wrong"))
    assert wire.seen() == []
    change = wire.nic().since(before)
    assert (change["divergences.payload"], change["partial"]) == (1, 0)
    (flow,) = wire.flows(talk.guest_port)
    assert flow.owner == 0


@pytest.mark.parametrize("flags", ["A", "FA"])
def test_a_part_that_both_have_said_leaves(wire: Wire, talk: Talk, flags: str) -> None:
    wire.pvm(talk.tcp(1, b"rightdata", flags=flags))
    wire.svm(talk.tcp(1, b"right"), talk.tcp(1, b"right"))
    assert [Heard.of(frame).data for frame in wire.released(1)] == [b"right"]
    wire.svm(talk.tcp(6, b"data", flags=flags))
    assert [Heard.of(frame).data for frame in wire.released(1)] == [b"rightdata"]


def test_the_first_held_packet_may_not_be_the_one_that_is_matched_in_part(wire: Wire, talk: Talk) -> None:
    """The PVM reorders, and its segments overlap: what is left of the later one's sum is the sum from its own beginning on."""
    wire.pvm(talk.tcp(1, STREAM[:10]))
    wire.svm(talk.tcp(1, STREAM[:10]))
    assert len(wire.released(1)) == 1
    before = wire.nic()
    wire.pvm(talk.tcp(111, STREAM[110:310]), talk.tcp(11, STREAM[10:160]))
    wire.svm(talk.tcp(11, STREAM[10:130]), talk.tcp(11, STREAM[10:130]))
    assert [b for frame in wire.seen() if (b := Heard.of(frame).data) != STREAM[10:130]] == []
    wire.svm(talk.tcp(131, STREAM[130:310]))
    assert {Heard.of(frame).data for frame in wire.released(2)} >= {STREAM[110:310], STREAM[10:160]}
    change = wire.nic().since(before)
    assert {name: n for name, n in change.items() if name.startswith("divergences")} == {}
