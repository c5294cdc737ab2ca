"""What the rules of other modules promise holds for connections that the client knows by other numbers as well.

Their tests run here once more, on a primary that translates at its vif (bpf/alias.h): whatever is held, compared,
answered and flushed has the guest's numbers, whatever reaches the client has the client's.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from coloebpf.lab.plan import PAIR
from coloebpf.model import State
from tests.lab.aliased import DELTA, TICKS, AliasedWire
from tests.lab.conftest import LabMaker
from tests.lab.heard import Heard, same_frames
from tests.lab.talk import M32, Talk

__all__ = [name for name in globals() if name.startswith("test_")]

pytestmark = pytest.mark.lab

TCP = 6
SOFT = [("NOP", None), ("NOP", None)]


@pytest.fixture(scope="module")
def wire(make_module_lab: LabMaker) -> Iterator[AliasedWire]:
    """A bare lab of which every connection is an older guest's."""
    wire = AliasedWire(make_module_lab(guests="none").plan)
    wire.pvm(Talk(wire).tcp(1))  # the switch learns where the guest is
    wire.clean()
    yield wire
    wire.close()


@pytest.fixture(autouse=True)
def _clean(wire: AliasedWire) -> Iterator[None]:
    yield
    for control in wire.control.values():
        control.set_state(PAIR, State.LOCKSTEP)
    wire.clean()


def test_the_client_sees_numbers_that_no_vm_has(wire: AliasedWire, talk: Talk) -> None:
    """What the other tests here stand on."""
    frame = talk.tcp(2, b"y", options=[*SOFT, ("Timestamp", (7, 8))])
    wire.pvm(frame)
    wire.svm(frame)
    (raw,) = wire.as_sent(1)
    assert (Heard.of(raw).seq, Heard.of(raw).ack) == ((2 + DELTA) & M32, 1000)
    assert Heard.of(raw).timestamps == ((7 + TICKS) & M32, 8)
    assert Heard.of(raw).sums_hold()


def test_both_vms_hear_the_client_in_the_guests_numbers(wire: AliasedWire, talk: Talk) -> None:
    wire.pvm(talk.tcp(1, b"x"))
    wire.svm(talk.tcp(1, b"x"))
    wire.released(1)
    sack = ("SAck", (500, 600, 700, 800))
    frame = talk.client_tcp(1000, b"question", ack=2, options=[*SOFT, ("Timestamp", (9, 4711)), *SOFT, sack])
    wire.client(frame)
    for vm in ("pvm", "svm"):
        assert wire.await_frames(vm, 1) == [frame]


def test_the_svm_is_answered_in_the_guests_numbers(wire: AliasedWire, talk: Talk) -> None:
    """The copy of the client's ACK was lost on fwd, and the SVM repeats what it was not acknowledged."""
    data = talk.tcp(1, b"data")
    wire.pvm(data)
    wire.svm(data)
    assert len(wire.released(1)) == 1
    wire.client(talk.client_tcp(1000, ack=5))
    wire.seen("svm")
    wire.svm(data)
    (answer,) = wire.await_frames("svm", 1)
    assert (Heard.of(answer).seq, Heard.of(answer).ack) == (1000, 5)
    assert Heard.of(answer).sums_hold()


def test_exempt_connections_are_translated_too(wire: AliasedWire, talk: Talk) -> None:
    wire.control["primary"].exempt_add(TCP, talk.guest_port, "::/0")
    try:
        frame = talk.tcp(1, b"x")
        wire.pvm(frame)
        same_frames(wire.released(1), [frame])
    finally:
        wire.control["primary"].exempt_del(TCP, talk.guest_port, "::/0")


def test_nothing_else_changes(wire: AliasedWire, talk: Talk) -> None:
    wire.pvm(talk.udp(b"abc"))
    wire.svm(talk.udp(b"abc"))
    assert wire.released(1) == [talk.udp(b"abc")]
    wire.client(talk.udp(b"abc", output=False))
    assert wire.await_frames("pvm", 1) == [talk.udp(b"abc", output=False)]
