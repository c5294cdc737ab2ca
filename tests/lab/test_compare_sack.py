"""SACK blocks in the PVM's output: the client takes them for received and would not send again what the SVM lacks.

So none leaves that the SVM hasn't reported (promise 2)."""

from __future__ import annotations

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from tests.lab.talk import KINDS, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab
STAMPS = [("NOP", None), ("NOP", None), ("Timestamp", (11, 22))]
PADDING = [("NOP", None), ("NOP", None)]


def sack(*edges: int) -> list[tuple[str, object]]:
    return [*PADDING, ("SAck", edges)]


def blocks_of(frame: bytes) -> tuple[int, ...]:
    """Edges of the SACK option of a released frame; its checksums are right."""
    packet = Ether(frame)
    sums = packet[TCP].chksum
    again = packet.copy()
    del again[TCP].chksum
    assert Ether(bytes(again))[TCP].chksum == sums
    for kind, value in packet[TCP].options:
        if kind == "SAck":
            return tuple(value)
    return ()


@pytest.fixture(params=KINDS)
def talk(wire: Wire, request: pytest.FixtureRequest) -> Talk:
    wire.clean()
    return Talk(wire, **KINDS[request.param])


@pytest.mark.parametrize("stamps", [STAMPS, []], ids=["stamps", "plain"])
@pytest.mark.parametrize(
    ("svm", "pvm", "leaves"),
    [
        ((), (3000, 4000), ()),
        ((3000, 4000), (3000, 4000), (3000, 4000)),
        ((3000, 5000), (3000, 4000), (3000, 4000)),
        ((3000, 3999), (3000, 4000), ()),
        ((3001, 4000), (3000, 4000), ()),
        ((3000, 4000, 6000, 7000), (6000, 7000, 3000, 4000), (6000, 7000, 3000, 4000)),
        ((3000, 4000), (6000, 7000, 3000, 4000), ()),
        ((), (500, 900), (500, 900)),  # below what the SVM has acknowledged (RFC 2883, duplicate SACK)
    ],
)
def test_blocks_that_the_svm_has_not_reported_do_not_leave(
    wire: Wire, talk: Talk, svm: tuple[int, ...], pvm: tuple[int, ...], leaves: tuple[int, ...], stamps: list[object]
) -> None:
    wire.svm(talk.tcp(100, ack=1000, options=[*stamps, *(sack(*svm) if svm else ())]))
    wire.pvm(talk.tcp(100, ack=1000, options=[*stamps, *sack(*pvm)]))
    (frame,) = wire.released(1)
    assert blocks_of(frame) == leaves
    assert Ether(frame)[TCP].ack == 1000


def test_data_lose_their_blocks_too(wire: Wire, talk: Talk) -> None:
    wire.svm(talk.tcp(100, b"answer", ack=1000))
    wire.pvm(talk.tcp(100, b"answer", ack=1000, options=sack(3000, 4000)))
    (frame,) = wire.released(1)
    assert blocks_of(frame) == ()
    assert bytes(Ether(frame)[TCP].payload) == b"answer"


def test_held_data_get_the_blocks_that_the_proof_brings(wire: Wire, talk: Talk) -> None:
    wire.pvm(talk.tcp(100, b"answer", ack=1000, options=sack(3000, 4000)))
    assert wire.released() == []
    wire.svm(talk.tcp(100, b"answer", ack=1000, options=sack(3000, 4000)))
    (frame,) = wire.released(1)
    assert blocks_of(frame) == (3000, 4000)
