"""What a lost frame of the forward link must not do: leave a VM waiting for ever. docs/design.md, section 12.

The rows have no stack: each frame that a VM or the client would send is sent by hand, and a lost one is not sent."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.lab.conftest import LabMaker
from tests.lab.heard import Heard, same_frames
from tests.lab.loss import Loss
from tests.lab.talk import KINDS, M32, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

FIN, RST, ACK = 0x01, 0x04, 0x10
SOFT = [("NOP", None), ("NOP", None)]
PVM, SVM, CLIENT = 5_000, 900_000, 70_000  # ISNs
BASES = {"low": 0, "wrap": 2**32 - 5_010}  # added to the PVM's; the second wraps some bytes after the handshake
OFFER = [("MSS", 1460), ("SAckOK", b"")]
SIZE = 100  # bytes of a segment


@pytest.fixture(scope="module")
def shared(make_module_lab: LabMaker) -> Iterator[Wire]:
    """Two NICs on one forward link: an answer needs the NIC's VLAN tag."""
    wire = Wire(make_module_lab(guests="none", nics=2, vlan=True).plan)
    wire.pvm(Talk(wire, nic=1).tcp(1), nic=1)
    wire.clean()
    wire.checkpoint()
    wire.seen()
    yield wire
    wire.close()


@pytest.fixture(params=KINDS)
def talk(request: pytest.FixtureRequest, wire: Wire) -> Iterator[Talk]:
    wire.clean()
    before = wire.nic()
    yield Talk(wire, **KINDS[request.param])
    change = wire.nic().since(before)
    assert sum(n for name, n in change.items() if name.startswith("divergences")) == 0
    wire.checkpoint()


class Call:
    """A connection that the client opens; the PVM's and the SVM's numbers differ. Positions count from behind the SYNs.

    What `lost()` wraps is lost on the forward link, from the primary to the secondary.
    """

    def __init__(self, talk: Talk, base: int = 0, stamps: bool = False, offer: Sequence[Any] = OFFER) -> None:
        self.talk, self.wire, self.stamps, self.offer = talk, talk.wire, stamps, list(offer)
        self.nic = talk.nic
        self.pvm_isn, self.svm_isn, self.client_isn = (PVM + base) & M32, SVM, CLIENT

    def options(self, value: int, echo: int, sack: Sequence[int] = ()) -> list[Any]:
        stamps = [*SOFT, ("Timestamp", (value & M32, echo & M32))] if self.stamps else []
        return [*stamps, *([*SOFT, ("SAck", tuple(edge & M32 for edge in sack))] if sack else [])]

    def pvm(self, at: int, data: bytes = b"", got: int = 0, clock: int = 0, **more: Any) -> bytes:
        options = self.options(1000 + clock, 50 + got)
        return self.talk.tcp(self.pvm_isn + 1 + at, data, ack=self.client_isn + 1 + got, options=options, **more)

    def svm(
        self, at: int, data: bytes = b"", got: int = 0, clock: int = 0, sack: Sequence[int] = (), **more: Any
    ) -> bytes:
        """`sack`: positions in the client's stream."""
        options = self.options(8000 + clock, 50 + got, [self.client_isn + 1 + edge for edge in sack])
        return self.talk.tcp(self.svm_isn + 1 + at, data, ack=self.client_isn + 1 + got, options=options, **more)

    def client(self, at: int = 0, data: bytes = b"", got: int = 0, clock: int = 0, **more: Any) -> bytes:
        options = self.options(50 + at, 1000 + clock)
        return self.talk.client_tcp(self.client_isn + 1 + at, data, ack=self.pvm_isn + 1 + got, options=options, **more)

    def open(self, ack: bool = True) -> None:
        """The handshake; without `ack` the client's is not sent yet."""
        wire, talk = self.wire, self.talk
        first = self.options(50, 0)
        wire.client(talk.client_tcp(self.client_isn, flags="S", ack=0, options=[*self.offer, *first]))
        pvm = talk.tcp(
            self.pvm_isn, flags="SA", ack=self.client_isn + 1, options=[*self.offer, *self.options(1000, 50)]
        )
        wire.send("pvm", pvm, f"eth{self.nic}")
        wire.send("svm", self.syn_ack(), f"eth{self.nic}")
        same_frames(wire.released(1), [pvm])
        if ack:
            wire.client(self.client())
        self.forget()

    def syn_ack(self) -> bytes:
        options = [*self.offer, *self.options(8000, 50)]
        return self.talk.tcp(self.svm_isn, flags="SA", ack=self.client_isn + 1, options=options)

    def both(self, at: int, data: bytes, **more: Any) -> None:
        """Both VMs send it; it leaves."""
        self.wire.send("pvm", self.pvm(at, data, **more), f"eth{self.nic}")
        self.wire.send("svm", self.svm(at, data, **more), f"eth{self.nic}")
        assert len(self.wire.released(1)) == 1
        self.forget()

    def forget(self) -> None:
        for node in ("client", "pvm", "svm"):
            self.wire.seen(node, f"eth{self.nic}" if node != "client" else "eth0")

    def loses(self, *frames: bytes) -> None:
        """The client sends; the SVM gets nothing of it."""
        plan = self.wire.plan
        self.wire.seen("svm", f"eth{self.nic}")
        with Loss(plan.namespace("primary"), "fwd0", "egress", per_mille=1000):
            self.wire.client(*frames)
        assert self.wire.seen("svm", f"eth{self.nic}") == []
        self.wire.seen("pvm", f"eth{self.nic}")

    def tells(self, frame: bytes) -> list[Heard]:
        """The SVM sends; what it is answered. Nothing reaches the client."""
        self.wire.send("svm", frame, f"eth{self.nic}")
        got = [Heard.of(one) for one in self.wire.seen("svm", f"eth{self.nic}")]
        for one in got:
            assert one.sums_hold()
            model = self.client()
            assert one.frame[: one.l3] == model[: one.l3]  # addresses and the guest's tags
            assert one.frame[one.l4 : one.l4 + 4] == model[one.l4 : one.l4 + 4]
            assert one.frame[one.l4 - 8 : one.l4] == model[one.l4 - 8 : one.l4]
        return got

    def at_svm(self, position: int) -> int:
        """The number that the SVM is told of a position in its stream."""
        return (self.svm_isn + 1 + position) & M32


def data(at: int) -> bytes:
    return b"%09d." % at * (SIZE // 10)


@pytest.fixture(params=BASES)
def base(request: pytest.FixtureRequest) -> int:
    return BASES[request.param]


# ---- (a) the client's frames, from the primary to the secondary ------------------------------------------------------


@pytest.mark.parametrize("stamps", [False, True], ids=["plain", "stamps"])
def test_what_the_client_acknowledged_the_svm_is_told_again(talk: Talk, base: int, stamps: bool) -> None:
    call = Call(talk, base, stamps)
    call.open()
    call.both(0, data(0))
    call.both(SIZE, data(SIZE))
    call.loses(call.client(got=2 * SIZE, window=321))
    (heard,) = call.tells(call.svm(0, data(0), clock=7))
    assert (heard.ack, heard.seq, heard.window) == (call.at_svm(2 * SIZE), call.client_isn + 1, 321)
    assert (heard.flags, heard.data, heard.sack) == (ACK, b"", [])
    if stamps:
        assert heard.timestamps == (50, 8007)  # RFC 7323, 4.3: the repetition's own value comes back
    assert talk.wire.seen() == []


def test_what_the_client_has_not_acknowledged_is_not_answered(talk: Talk) -> None:
    call = Call(talk)
    call.open()
    call.both(0, data(0))
    assert call.tells(call.svm(0, data(0))) == []
    call.both(SIZE, data(SIZE))
    talk.wire.client(call.client(got=SIZE))
    call.forget()
    assert call.tells(call.svm(SIZE, data(SIZE))) == []
    (heard,) = call.tells(call.svm(0, data(0)))
    assert heard.ack == call.at_svm(SIZE)


def test_the_svms_fin_is_answered(talk: Talk) -> None:
    call = Call(talk)
    call.open()
    call.both(0, data(0), flags="FA")
    call.loses(call.client(got=SIZE + 1))
    (heard,) = call.tells(call.svm(SIZE, flags="FA"))
    assert heard.ack == call.at_svm(SIZE + 1)


def test_the_svms_probe_of_a_shut_window_is_answered(talk: Talk) -> None:
    """The client's window update was lost; the SVM probes with a number below what was acknowledged."""
    call = Call(talk)
    call.open()
    call.both(0, data(0))
    talk.wire.client(call.client(got=SIZE, window=0))
    call.loses(call.client(got=SIZE, window=400))
    (heard,) = call.tells(call.svm(SIZE - 1))
    assert (heard.ack, heard.window) == (call.at_svm(SIZE), 400)
    assert call.tells(call.svm(SIZE)) == []  # a plain ACK is never answered


def test_a_repeated_syn_ack_gets_the_handshakes_ack(talk: Talk) -> None:
    call = Call(talk)
    call.open(ack=False)
    assert call.tells(call.syn_ack()) == []  # the client has not said anything yet
    call.loses(call.client())
    (heard,) = call.tells(call.syn_ack())
    assert (heard.ack, heard.seq, heard.flags) == (call.at_svm(0), call.client_isn + 1, ACK)


def test_the_clients_reset_is_told_again(talk: Talk) -> None:
    call = Call(talk)
    call.open()
    call.both(0, data(0))
    call.loses(call.client(5, flags="R", got=0))
    (heard,) = call.tells(call.svm(SIZE, data(SIZE)))
    assert (heard.flags, heard.seq) == (RST, call.client_isn + 6)


def test_no_ack_of_what_never_left_is_noted(talk: Talk) -> None:
    """Somebody forges: beyond what was sent, or older than what the guest has acknowledged."""
    call = Call(talk)
    call.open()
    call.both(0, data(0), got=50)
    call.loses(call.client(50, got=SIZE + 1), call.client(10, got=SIZE))
    assert call.tells(call.svm(0, data(0), got=50)) == []
    call.loses(call.client(50, got=SIZE), call.client(50, got=1))  # the late one changes nothing
    (heard,) = call.tells(call.svm(0, data(0), got=50))
    assert heard.ack == call.at_svm(SIZE)


def test_a_new_connection_on_the_same_ports_forgets_the_old(talk: Talk) -> None:
    call = Call(talk)
    call.open()
    call.both(0, data(0), flags="FA")
    talk.wire.client(call.client(got=SIZE + 1, flags="FA"))
    again = Call(talk, base=100_000)
    again.client_isn += 1_000_000
    again.svm_isn += 500_000
    again.open(ack=False)
    assert again.tells(again.syn_ack()) == []
    talk.wire.client(again.client())
    again.both(0, data(0))
    assert again.tells(again.svm(0, data(0))) == []
    again.loses(again.client(got=SIZE))
    (heard,) = again.tells(again.svm(0, data(0)))
    assert heard.ack == again.at_svm(SIZE)


def test_a_checkpoint_keeps_what_the_client_said(talk: Talk) -> None:
    call = Call(talk)
    call.open()
    call.both(0, data(0))
    call.loses(call.client(got=SIZE))
    talk.wire.checkpoint()
    call.svm_isn = call.pvm_isn  # it is a copy of the PVM now
    (heard,) = call.tells(call.svm(0, data(0)))
    assert heard.ack == call.at_svm(SIZE)


def test_a_connection_met_in_the_middle_is_answered(talk: Talk) -> None:
    call = Call(talk)
    call.svm_isn = call.pvm_isn
    call.both(0, data(0))
    call.loses(call.client(got=SIZE))
    (heard,) = call.tells(call.svm(0, data(0)))
    assert heard.ack == call.at_svm(SIZE)


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_on_a_shared_link_has_the_nics_tag(shared: Wire, kind: str) -> None:
    call = Call(Talk(shared, nic=1, **KINDS[kind]))
    call.open()
    call.both(0, data(0))
    call.loses(call.client(got=SIZE))
    (heard,) = call.tells(call.svm(0, data(0)))
    assert heard.ack == call.at_svm(SIZE)


# ---- (b) the SVM's frames, from the secondary to the primary ---------------------------------------------------------


@pytest.mark.parametrize("stamps", [False, True], ids=["plain", "stamps"])
def test_a_hole_in_the_svms_output_is_told_with_sack_blocks(talk: Talk, base: int, stamps: bool) -> None:
    call, wire = Call(talk, base, stamps), talk.wire
    call.open()
    call.both(0, data(0))
    wire.client(call.client(got=SIZE))
    wire.pvm(*(call.pvm(at, data(at)) for at in range(SIZE, 8 * SIZE, SIZE)))
    call.forget()
    told: list[list[int]] = []
    for at in (2, 3, 5, 7):  # 1, 4 and 6 are lost
        (heard,) = call.tells(call.svm(at * SIZE, data(at * SIZE)))
        assert (heard.ack, heard.flags, heard.data) == (call.at_svm(SIZE), ACK, b"")
        if stamps:
            assert heard.timestamps[1] == 8000
        told.append([(edge - call.svm_isn - 1) & M32 for edge in heard.sack])
    assert told == [
        [2 * SIZE, 3 * SIZE],
        [2 * SIZE, 4 * SIZE],
        [5 * SIZE, 6 * SIZE, 2 * SIZE, 4 * SIZE],
        [7 * SIZE, 8 * SIZE, 5 * SIZE, 6 * SIZE, 2 * SIZE, 4 * SIZE],
    ]
    (heard,) = call.tells(call.svm(3 * SIZE, data(3 * SIZE)))  # it did not hear that
    assert len(heard.sack) == 6
    assert wire.seen() == []  # not one byte before its proof
    for at, released in ((1, 3), (4, 2), (6, 2)):
        wire.svm(call.svm(at * SIZE, data(at * SIZE)))
        assert len(wire.released(released)) == released
    assert wire.nic()["held"] == wire.nic()["parked"] == 0


def test_more_holes_than_an_ack_has_room_for(talk: Talk) -> None:
    call, wire = Call(talk, stamps=True), talk.wire
    call.open()
    call.both(0, data(0))
    wire.client(call.client(got=SIZE))
    wire.pvm(*(call.pvm(at, data(at)) for at in range(SIZE, 12 * SIZE, SIZE)))
    call.forget()
    for at in (2, 4, 6, 8, 10):
        (heard,) = call.tells(call.svm(at * SIZE, data(at * SIZE)))
    edges = [(edge - call.svm_isn - 1) // SIZE for edge in heard.sack]
    assert edges == [10, 11, 8, 9, 6, 7]
    call.forget()
    for at in (1, 3, 5, 7, 9, 11):
        wire.svm(call.svm(at * SIZE, data(at * SIZE)))
    assert len(wire.released(11)) == 11


def test_an_svm_that_is_only_ahead_is_told_nothing(talk: Talk) -> None:
    call, wire = Call(talk), talk.wire
    call.open()
    call.both(0, data(0))
    wire.client(call.client(got=SIZE))
    call.forget()
    for at in range(SIZE, 8 * SIZE, SIZE):
        assert call.tells(call.svm(at, data(at))) == []
    (heard,) = call.tells(call.svm(9 * SIZE, data(9 * SIZE)))  # a hole behind what waits for the PVM
    assert [(edge - call.svm_isn - 1) // SIZE for edge in heard.sack] == [9, 10]
    assert call.tells(call.svm(8 * SIZE, data(8 * SIZE))) == []
    assert call.tells(call.svm(10 * SIZE, data(10 * SIZE))) == []
    wire.pvm(*(call.pvm(at, data(at)) for at in range(SIZE, 11 * SIZE, SIZE)))
    assert len(wire.released(10)) == 10


def test_without_sack_the_duplicate_is_plain(talk: Talk) -> None:
    call, wire = Call(talk, offer=[("MSS", 1460)]), talk.wire
    call.open()
    call.both(0, data(0))
    wire.client(call.client(got=SIZE))
    call.forget()
    for at in (2, 3, 4):
        (heard,) = call.tells(call.svm(at * SIZE, data(at * SIZE)))
        assert (heard.ack, heard.tcp_options) == (call.at_svm(SIZE), b"")


def test_the_acknowledged_number_is_the_clients(talk: Talk) -> None:
    """What has left, but was not acknowledged, the SVM must keep: the client may lose it."""
    call, wire = Call(talk), talk.wire
    call.open()
    for at in range(0, 3 * SIZE, SIZE):
        call.both(at, data(at))
    wire.client(call.client(got=SIZE))
    call.forget()
    (heard,) = call.tells(call.svm(4 * SIZE, data(4 * SIZE)))
    assert heard.ack == call.at_svm(SIZE)
    assert [(edge - call.svm_isn - 1) // SIZE for edge in heard.sack] == [4, 5]


def test_a_commit_forgets_what_the_old_svm_had_sent(talk: Talk) -> None:
    call, wire = Call(talk), talk.wire
    call.open()
    call.both(0, data(0))
    wire.client(call.client(got=SIZE))
    call.forget()
    assert len(call.tells(call.svm(2 * SIZE, data(2 * SIZE)))) == 1
    wire.checkpoint()
    call.svm_isn = call.pvm_isn
    (heard,) = call.tells(call.svm(5 * SIZE, data(5 * SIZE)))
    assert [(edge - call.svm_isn - 1) // SIZE for edge in heard.sack] == [5, 6]


# ---- (c) and (d) the client's data, from the primary to the secondary ------------------------------------------------


def acks(frames: list[bytes]) -> list[tuple[int, list[int]]]:
    assert all(Heard.of(frame).sums_hold() for frame in frames)
    return [(Heard.of(f).ack - CLIENT - 1, [e - CLIENT - 1 for e in Heard.of(f).sack]) for f in frames]


@pytest.mark.parametrize("stamps", [False, True], ids=["plain", "stamps"])
def test_the_svms_duplicate_acks_reach_the_client(talk: Talk, stamps: bool) -> None:
    call, wire = Call(talk, stamps=stamps), talk.wire
    call.open()
    for node, frame in (("pvm", call.pvm(0, got=SIZE)), ("svm", call.svm(0, got=SIZE))):
        wire.send(node, frame)
    assert acks(wire.released(1)) == [(SIZE, [])]
    wire.pvm(call.pvm(0, got=4 * SIZE, clock=9))
    assert wire.seen() == []  # held: the SVM lacks the second segment
    for sack, told in (
        ([2, 3], [2, 3]),
        ([2, 4], [2, 4]),
        ([2, 5], [2, 4]),  # the PVM has not said that it has the fifth
        ([5, 6, 2, 4], [2, 4]),
    ):
        wire.svm(call.svm(0, got=SIZE, sack=[edge * SIZE for edge in sack]))
        frames = wire.released(1)
        assert acks(frames) == [(SIZE, [edge * SIZE for edge in told])]
        assert Heard.of(frames[0]).seq == (call.pvm_isn + 1) & M32
        if stamps:  # the echo is the SVM's, of the segment that it acknowledges
            assert Heard.of(frames[0]).timestamps == (1000, 50 + SIZE)
    wire.svm(call.svm(0, got=SIZE, sack=[4 * SIZE, 5 * SIZE]))  # the PVM may not have it
    assert wire.seen() == []
    wire.svm(call.svm(0, got=4 * SIZE))
    assert acks(wire.released(1)) == [(4 * SIZE, [])]
    assert wire.nic()["held"] == 0


def test_without_sack_an_acks_repetition_reaches_the_client(talk: Talk) -> None:
    call, wire = Call(talk, offer=[("MSS", 1460)]), talk.wire
    call.open()
    wire.pvm(call.pvm(0, got=4 * SIZE))
    wire.svm(call.svm(0, got=SIZE))
    assert acks(wire.released(1)) == [(SIZE, [])]
    for _ in range(3):
        wire.svm(call.svm(0, got=SIZE))
        assert acks(wire.released(1)) == [(SIZE, [])]
    wire.svm(call.svm(0, got=SIZE, window=400))  # an update, no duplicate
    assert wire.seen() == []
    wire.svm(call.svm(0, got=4 * SIZE, window=400))
    assert acks(wire.released(1)) == [(4 * SIZE, [])]


def test_a_held_ack_tells_what_both_have_acknowledged(talk: Talk) -> None:
    """The pure ACK of the PVM waits for the SVM; what of it the SVM has acknowledged is told meanwhile."""
    call, wire = Call(talk), talk.wire
    call.open()
    wire.pvm(call.pvm(0, got=9 * SIZE))
    for got in (2, 5, 8):
        wire.svm(call.svm(0, got=got * SIZE))
        assert acks(wire.released(1)) == [(got * SIZE, [])]
    wire.svm(call.svm(0, got=9 * SIZE))
    assert acks(wire.released(1)) == [(9 * SIZE, [])]
    assert wire.nic()["held"] == 0


def test_an_ack_behind_unproven_data_is_told_too(talk: Talk) -> None:
    call, wire = Call(talk), talk.wire
    call.open()
    wire.pvm(call.pvm(0, data(0)), call.pvm(SIZE, got=3 * SIZE))
    wire.svm(call.svm(0, got=3 * SIZE))
    assert acks(wire.released(1)) == [(3 * SIZE, [])]
    wire.svm(call.svm(0, data(0), got=3 * SIZE))
    assert Heard.of(wire.released()[0]).data == data(0)


def test_the_window_goes_with_the_ack_that_brought_it(talk: Talk) -> None:
    """What a held ACK says of the window counts as well: the right edge is never beyond either VM's."""
    call, wire = Call(talk), talk.wire
    call.open()
    wire.pvm(call.pvm(0, got=4 * SIZE, window=100))
    wire.svm(call.svm(0, got=2 * SIZE, window=500))
    (frame,) = wire.released(1)
    assert (acks([frame]), Heard.of(frame).window) == ([(2 * SIZE, [])], 100)


# ---- the end of a connection -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("node", ["pvm", "svm"])
def test_a_reset_of_what_both_sides_have_closed_is_dropped(talk: Talk, node: str) -> None:
    """A late frame that only one of the VMs got, or that only one of them has forgotten the connection for."""
    call, wire = Call(talk), talk.wire
    call.open()
    call.both(0, data(0), flags="FA")
    wire.client(call.client(got=SIZE + 1, flags="FA"))
    for who, frame in (("pvm", call.pvm(SIZE + 1, got=1)), ("svm", call.svm(SIZE + 1, got=1))):
        wire.send(who, frame)
    assert len(wire.released(1)) == 1
    before = wire.nic()
    wire.send(node, talk.tcp((call.pvm_isn if node == "pvm" else call.svm_isn) + SIZE + 2, flags="R", ack=0))
    assert wire.seen() == []
    change = wire.nic().since(before)
    assert (change["held"], change["parked"], change["dropped.closed"]) == (0, 0, 1 if node == "pvm" else 0)


def test_a_reset_while_the_client_still_sends_is_compared(talk: Talk) -> None:
    call, wire = Call(talk), talk.wire
    call.open()
    call.both(0, data(0), flags="FA")
    wire.client(call.client(got=SIZE + 1))
    wire.pvm(talk.tcp(call.pvm_isn + SIZE + 2, flags="R", ack=0))
    assert wire.seen() == []
    wire.svm(talk.tcp(call.svm_isn + SIZE + 2, flags="R", ack=0))
    assert len(wire.released(1)) == 1
