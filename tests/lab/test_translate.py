"""TCP numbers on the secondary: what the SVM hears and what leaves for the primary, design.md section 6."""

from __future__ import annotations

import ctypes as ct
import random
from collections.abc import Iterator
from typing import Any

import pytest

from coloebpf import bpfsys
from tests.lab.connection import Connection
from tests.lab.heard import Heard, same_frames
from tests.lab.talk import M32, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

FIN_SEEN, RST_SEEN, CLIENT_FIN_SEEN, OPEN_SEEN, DELTA_KNOWN = 0x40, 0x80, 0x40000, 0x1000, 0x8000  # bpf/types.h, FLOW_*
OFFSETS = [(1000, 5000), (5000, 1000), (2**32 - 3, 70), (70, 2**32 - 3), (2**31, 0), (9, 9)]  # ISN of PVM and SVM


@pytest.fixture(autouse=True)
def _clean(wire: Wire) -> Iterator[None]:
    yield
    wire.clean()
    wire.seen("primary", "fwd0")


@pytest.mark.parametrize("opening", ["accept", "connect"])
@pytest.mark.parametrize("stamps", [None, (10_000, 77), (5, 2**32 - 2)], ids=["plain", "stamps", "stamps-wrap"])
@pytest.mark.parametrize("isns", OFFSETS, ids=str)
def test_a_connection_from_its_opening_to_its_end(
    wire: Wire, talk: Talk, isns: tuple[int, int], stamps: tuple[int, int] | None, opening: str
) -> None:
    c = Connection(wire, talk, *isns, stamps=stamps)
    getattr(c, opening)()
    # the client asks: only ACK, echo and checksum change, and they become the SVM's
    request = c.client(1, b"question", ticks=3)
    heard = c.hears(request)
    assert heard is not None
    c.checks_ack(heard, 1, ticks=3)
    assert (heard.seq, heard.data, heard.flags) == ((c.client_isn + 1) & M32, b"question", 0x10)
    # both answer: the SVM's numbers arrive as the PVM's
    wire.pvm(c.pvm(1, b"answer", got=9, ticks=4))
    assert wire.seen() == []
    said = c.says(c.svm(1, b"answer", got=9, ticks=6))
    assert (said.seq, said.ack, said.data) == ((c.pvm_isn + 1) & M32, c.client_isn + 9, b"answer")
    if c.stamps:
        assert said.timestamps == ((c.stamps[0] + 6) & M32, 59)
    same_frames(wire.released(1), [c.pvm(1, b"answer", got=9, ticks=4)])
    # SACK blocks are the PVM's numbers to the client, and the SVM's to the SVM
    edges = [3, 5, 6, 7] if c.stamps else [2, 3, 4, 5, 6, 7]
    heard = c.hears(c.client(9, got=2, sack=edges))
    assert heard is not None
    c.checks_ack(heard, 2)
    assert heard.sack == [(c.svm_isn + edge) & M32 for edge in edges]
    # ends
    c.release(c.pvm(7, flags="FA", got=9), c.svm(7, flags="FA", got=9))
    heard = c.hears(c.client(9, flags="FA", got=8))
    assert heard is not None
    c.checks_ack(heard, 8)
    assert c.flags() & (FIN_SEEN | CLIENT_FIN_SEEN) == FIN_SEEN | CLIENT_FIN_SEEN
    said = c.says(c.svm(8, got=10))
    assert said.seq == (c.pvm_isn + 8) & M32
    wire.pvm(c.pvm(8, got=10))
    assert len(wire.released(1)) == 1


def test_resets_of_both_sides(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 100, 900)
    c.accept()
    heard = c.hears(c.client(1, flags="RA"))
    assert heard is not None
    c.checks_ack(heard, 1)
    assert c.flags() & RST_SEEN
    talk.guest_port += 20_000
    c = Connection(wire, talk, 100, 900)
    c.accept()
    said = c.says(c.svm(1, flags="RA"))
    assert said.seq == 101
    wire.pvm(c.pvm(1, flags="RA"))
    same_frames(wire.released(1), [c.pvm(1, flags="RA")])
    assert c.flags() & RST_SEEN


def test_a_reset_of_a_closed_port_stays_at_zero(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 0, 0)
    assert c.hears(c.client(0, flags="S", got=0)) is not None
    wire.pvm(talk.tcp(0, flags="RA", ack=c.client_isn + 1))
    said = c.says(talk.tcp(0, flags="RA", ack=c.client_isn + 1))
    assert (said.seq, said.ack) == (0, c.client_isn + 1)
    same_frames(wire.released(1), [talk.tcp(0, flags="RA", ack=c.client_isn + 1)])


def test_an_early_ack_waits_for_the_svms_answer(wire: Wire, talk: Talk) -> None:
    """The client's ACK comes before the SVM's SYN-ACK (a commit let the PVM's out): it would reset."""
    c = Connection(wire, talk, 100, 900, stamps=(10, 70))
    before = wire.nic(host="secondary")
    assert c.hears(c.client(0, flags="S", got=0)) is not None
    assert c.hears(c.client(1)) is None
    assert wire.nic(host="secondary").since(before)["dropped.early_ack"] == 1
    assert c.says(c.svm(0, flags="SA")).seq == 900  # a SYN is compared without its number
    heard = c.hears(c.client(1, b"data"))
    assert heard is not None
    c.checks_ack(heard, 1)
    assert c.says(c.svm(1, b"answer")).seq == 101


def test_what_the_client_repeats_is_translated_alike(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 100, 900)
    assert c.hears(c.client(0, flags="S", got=0)) is not None
    assert c.hears(c.client(0, flags="S", got=0)) is not None
    c.release(c.pvm(0, flags="SA"), c.svm(0, flags="SA"))
    c.says(c.svm(0, flags="SA"))  # again, it did not hear the ACK
    for _ in range(3):
        heard = c.hears(c.client(1, b"data"))
        assert heard is not None
        c.checks_ack(heard, 1)
    heard = c.hears(c.client(0, flags="S", got=0))  # late
    assert heard is not None
    heard = c.hears(c.client(1, b"data"))
    assert heard is not None
    c.checks_ack(heard, 1)


def test_the_same_ports_again(wire: Wire, talk: Talk) -> None:
    """Each connection has an offset of its own, whoever opens it and however the one before ended."""
    for number, (pvm, svm) in enumerate(OFFSETS):
        c = Connection(wire, talk, pvm, svm, client_isn=1000 + 100_000 * number, stamps=(number, 50 * number))
        (c.connect if number % 2 else c.accept)()
        heard = c.hears(c.client(1, b"q", got=1))
        assert heard is not None
        c.checks_ack(heard, 1)
        c.release(c.pvm(1, b"a", got=2), c.svm(1, b"a", got=2))
        if number % 3 == 0:
            assert c.hears(c.client(2, flags="RA", got=2)) is not None
        elif number % 3 == 1:
            c.release(c.pvm(2, flags="FA", got=2), c.svm(2, flags="FA", got=2))


def test_a_checkpoint_makes_every_offset_zero(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 100, 900, stamps=(10, 70))
    c.accept()
    wire.checkpoint()
    c.svm_isn, c.stamps = c.pvm_isn, (10, 10)  # it is a copy of the PVM now
    heard = c.hears(c.client(1, b"data", ticks=5))
    assert heard is not None
    c.checks_ack(heard, 1, ticks=5)
    assert c.says(c.svm(1, b"x", got=5, ticks=6)).seq == 101
    wire.pvm(c.pvm(1, b"x", got=5))
    assert len(wire.released(1)) == 1


def test_a_handshake_that_a_checkpoint_cuts_in_two_has_offset_zero(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 100, 900)
    assert c.hears(c.client(0, flags="S", got=0)) is not None
    wire.svm(c.svm(0, flags="SA"))
    wire.pvm(c.pvm(0, flags="SA"))
    wire.released(1)
    wire.checkpoint()
    c.svm_isn = c.pvm_isn
    heard = c.hears(c.client(1))
    assert heard is not None
    c.checks_ack(heard, 1)
    assert c.says(c.svm(1, b"hello")).seq == 101


def test_a_connection_from_before_keeps_its_numbers(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 5000, 5000)
    frame = c.client(1, b"data", sack=[3, 4])
    wire.client(frame)
    assert wire.await_frames("svm", 1) == [frame]
    assert c.says(c.svm(1, b"data")).seq == 5001


def test_simultaneous_connections_do_not_mix(wire: Wire, talk: Talk) -> None:
    luck, made = random.Random(1), []
    for i in range(12):
        one = Talk(wire, talk.family, talk.tags, client_port=41_000 + i % 3)
        made.append(
            Connection(
                wire,
                one,
                luck.getrandbits(32),
                luck.getrandbits(32),
                stamps=(luck.getrandbits(32), luck.getrandbits(32)),
            )
        )
    for c in made:
        c.accept()
    luck.shuffle(made)
    for c in made:
        heard = c.hears(c.client(1, b"q", got=1, ticks=9))
        assert heard is not None
        c.checks_ack(heard, 1, ticks=9)
        assert c.says(c.svm(1, b"a", ticks=2)).seq == (c.pvm_isn + 1) & M32
    for c in made:
        wire.pvm(c.pvm(1, b"a"))
        same_frames(wire.released(1), [c.pvm(1, b"a")])


def test_options_at_odd_places(wire: Wire, talk: Talk) -> None:
    """Timestamps and SACK blocks need not be aligned; the checksum holds all the same."""
    c = Connection(wire, talk, 100, 900, stamps=(1 << 20, 3))
    c.accept()
    for lead in range(4):
        options = [("NOP", None)] * lead + [("Timestamp", (5, (1 << 20) + 8)), ("SAck", (103, 104))]
        heard = c.hears(talk.client_tcp(c.client_isn + 1, b"odd", ack=101, options=options))
        assert heard is not None
        assert (heard.ack, heard.timestamps, heard.sack) == (901, (5, 11), [903, 904])
        said = c.says(talk.tcp(901, b"odd", ack=c.client_isn + 4, options=options[:-1]))
        assert (said.seq, said.timestamps[0]) == (101, (5 + (1 << 20) - 3) & M32)


def test_what_is_not_tcp_is_not_touched(wire: Wire, talk: Talk) -> None:
    frames = [talk.udp(b"abc", output=False), talk.udp(b"", output=False)]
    for frame in frames:
        wire.client(frame)
        assert wire.await_frames("svm", 1) == [frame]


def test_wrong_checksums_stay_wrong(wire: Wire, talk: Talk) -> None:
    """What the PVM's stack refuses must be refused by the SVM's too."""
    c = Connection(wire, talk, 100, 900)
    c.accept()
    frame = bytearray(c.client(1, b"data"))
    frame[-1] ^= 1
    wire.client(bytes(frame))
    got = wire.await_frames("svm", 1)
    assert len(got) == 1
    assert not Heard.of(got[0]).sums_hold()


def test_ended_connections_give_their_places_back(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 100, 900)
    c.accept()
    assert c.hears(c.client(1, flags="RA")) is not None
    control = wire.control["secondary"]
    flow = next(iter(wire.flows(talk.guest_port, "secondary")))
    control.sweep()
    assert len(wire.flows(talk.guest_port, "secondary")) == 1  # not yet: a late packet may come
    idle_long_ago(wire, talk, flow)
    control.sweep()
    assert wire.flows(talk.guest_port, "secondary") == []


def test_live_connections_keep_theirs(wire: Wire, talk: Talk) -> None:
    c = Connection(wire, talk, 100, 900)
    c.accept()
    idle_long_ago(wire, talk, next(iter(wire.flows(talk.guest_port, "secondary"))))
    wire.control["secondary"].sweep()
    assert len(wire.flows(talk.guest_port, "secondary")) == 1
    heard = c.hears(c.client(1, b"still here"))
    assert heard is not None
    c.checks_ack(heard, 1)


def idle_long_ago(wire: Wire, talk: Talk, flow: Any) -> None:
    """Date a flow's last packet back by a minute: more than an ended one may be idle, less than a live one."""
    control = wire.control["secondary"]
    for key in bpfsys.keys(control.fd("flow_refs"), control.shapes.key("flow_refs")):
        ref = control.shapes.leaf("flow_refs")()
        bpfsys.lookup(control.fd("flow_refs"), key, ref)
        place = control.shapes.leaf("flows")()
        bpfsys.lookup(control.fd("flows"), ct.c_uint32(ref.index), place)
        if bytes(place.key) == bytes(flow.key):
            place.last_ns -= 61 * 10**9
            bpfsys.update(control.fd("flows"), ct.c_uint32(ref.index), place)
