"""TCP compared: one row per case of design.md section 4, both orders of arrival, IPv4 and IPv6, tagged and not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from tests.lab.heard import Heard, but_acks, same_frames
from tests.lab.talk import KINDS, Talk
from tests.lab.tcp_rows import DATA, EQUAL, UNEQUAL, Row, cut
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _clean(wire: Wire) -> Iterator[None]:
    yield
    wire.clean()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize("row", EQUAL, ids=lambda row: row.name)
def test_equal_output_is_released_as_the_pvm_sent_it(wire: Wire, row: Row, first: str, kind: str) -> None:
    talk = Talk(wire, **KINDS[kind])
    pvm, svm, before = row.pvm(talk), row.svm(talk), wire.nic()
    if first == "pvm":
        wire.pvm(*pvm)
        assert wire.seen() == []
        assert wire.nic().since(before)["held"] == len(pvm)
        wire.svm(*svm)
    else:
        wire.svm(*svm)
        assert wire.seen() == []
        wire.pvm(*pvm)
    fronts = row.fronts if first == "pvm" else 0
    got = wire.released(len(pvm) + fronts)
    for part in got[:fronts]:
        assert Heard.of(part).sums_hold(), part.hex()
        sent = bytes(Ether(part)[TCP].payload)
        assert sent
        assert bytes(Ether(pvm[0])[TCP].payload).startswith(sent)
    same_frames(got[fronts:], pvm)
    change = wire.nic().since(before)
    assert {name: n for name, n in change.items() if name.startswith(("divergences", "dropped"))} == {}
    assert (change["held"], change["parked"], change["released_packets"]) == (0, 0, len(pvm))
    assert change["compared_packets"] + change["retransmissions"] == len(pvm)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize("row", UNEQUAL, ids=lambda row: row.name)
def test_unequal_output_waits_for_a_checkpoint(wire: Wire, row: Row, first: str, kind: str) -> None:
    talk = Talk(wire, **KINDS[kind])
    pvm, svm, before = row.pvm(talk), row.svm(talk), wire.nic()
    for node in (first, "svm" if first == "pvm" else "pvm"):
        wire.send(node, pvm if node == "pvm" else svm)
    ahead = wire.seen()
    assert len(ahead) < len(pvm)
    change = wire.nic().since(before)
    assert {name: n for name, n in change.items() if name.startswith("divergences")} == {f"divergences.{row.reason}": 1}
    assert change["held"] == len(pvm) - len(ahead)
    event = wire.last_event("divergence")
    assert (event["reason"], event["flow"]["guest_port"], event["nic"]) == (row.reason, talk.guest_port, 0)
    assert event["flow"]["vlans"] == [number for _, number in talk.tags]
    assert event["pvm_digest"] != event["svm_digest"]
    wire.svm(*svm)  # it can't be talked into it
    wire.pvm(pvm[-1])
    assert wire.seen() == []
    wire.checkpoint()
    same_frames(ahead + wire.released(len(pvm) - len(ahead) + 1), [*pvm, pvm[-1]])
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_the_stream_goes_on_after_a_checkpoint(wire: Wire, kind: str) -> None:
    """A commit makes the positions equal: what both send from there on is compared from there on."""
    talk = Talk(wire, **KINDS[kind])
    wire.pvm(talk.tcp(1, b"one"))
    wire.svm(talk.tcp(1, b"two"))
    wire.checkpoint()
    same_frames(wire.released(1), [talk.tcp(1, b"one")])
    wire.pvm(talk.tcp(4, b"more"))
    assert wire.seen() == []
    wire.svm(talk.tcp(4, b"more"))
    same_frames(wire.released(1), [talk.tcp(4, b"more")])
    wire.svm(talk.tcp(8, b"and more"))
    wire.pvm(talk.tcp(8, b"and more"))
    same_frames(wire.released(1), [talk.tcp(8, b"and more")])


def test_what_the_svm_has_not_said_stays(wire: Wire) -> None:
    """A prefix proves only the segments it covers."""
    talk = Talk(wire)
    frames = cut(talk, 1, DATA, 700, 1400)
    wire.pvm(*frames)
    wire.svm(talk.tcp(1, DATA[:1399]))
    same_frames(wire.released(1), frames[:1])
    wire.svm(talk.tcp(1400, DATA[1399:1400]))
    same_frames(wire.released(1), frames[1:2])
    wire.svm(talk.tcp(1401, DATA[1400:2047]))
    assert wire.seen() == []
    wire.svm(talk.tcp(2048, DATA[2047:]))
    same_frames(wire.released(1), frames[2:])


def test_the_svm_may_be_far_ahead(wire: Wire) -> None:
    talk, step, count = Talk(wire), 100, 300
    stream = (DATA * 16)[: step * count]
    wire.svm(*cut(talk, 1, stream, *range(step, len(stream), step)))
    before = wire.nic()
    frames = cut(talk, 1, stream, *range(150, len(stream), 150))
    wire.pvm(*frames)
    same_frames(wire.released(len(frames)), frames)
    assert wire.nic().since(before)["parked"] == -count


def test_bad_checksums_are_released_as_they_are(wire: Wire) -> None:
    """The bytes are the PVM's, its checksum too: mending it would vouch for what the client should refuse."""
    talk = Talk(wire)
    frame = bytearray(talk.tcp(1, b"data"))
    frame[14 + 20 + 16] ^= 0x55
    wire.pvm(bytes(frame))
    wire.svm(talk.tcp(1, b"data"))
    got = wire.released(1)
    assert [f.hex() for f in got] == [bytes(frame).hex()]
    assert not Heard.of(got[0]).sums_hold()
    assert but_acks(got[0]) == but_acks(bytes(frame))
