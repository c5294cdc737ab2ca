"""Release rules of TCP: repetitions of either VM, and new connections on the same ports."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.lab.heard import Heard, same_frames
from tests.lab.talk import M32, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

SYN, FIN, ACK = 0x02, 0x01, 0x10


@pytest.fixture(autouse=True)
def _nothing_is_left(wire: Wire) -> Iterator[None]:
    before = wire.nic()
    yield
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)
    assert sum(n for name, n in change.items() if name.startswith("divergences")) == 0
    assert wire.seen() == []


def told(frames: list[bytes]) -> list[tuple[int, int]]:
    """ACK number and window of each frame, its checksums checked."""
    assert all(Heard.of(frame).sums_hold() for frame in frames)
    return [(Heard.of(frame).ack, Heard.of(frame).window) for frame in frames]


def open_stream(wire: Wire, talk: Talk, ack: int = 1000, window: int = 500, seq: int = 1) -> None:
    """One proven byte at `seq`; both VMs have acknowledged `ack`."""
    wire.pvm(talk.tcp(seq, b"x", ack=ack, window=window))
    wire.svm(talk.tcp(seq, b"x", ack=ack, window=window))
    assert told(wire.released(1)) == [(ack & M32, window)]


def test_a_pvm_only_retransmission_goes_out_at_once(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    for seq, data in ((2, b"abcdef"), (8, b"ghij")):
        wire.pvm(talk.tcp(seq, data))
        wire.svm(talk.tcp(seq, data))
        same_frames(wire.released(1), [talk.tcp(seq, data)])
    again = [talk.tcp(2, b"abcdef"), talk.tcp(8, b"ghij"), talk.tcp(4, b"cdefgh"), talk.tcp(1, b"xabcdefghij")]
    for frame in again:
        wire.pvm(frame)
        same_frames(wire.released(1), [frame])
    wire.pvm(talk.tcp(12, b"new"))
    wire.pvm(talk.tcp(2, b"abcdef"))  # also while something newer waits
    same_frames(wire.released(1), [talk.tcp(2, b"abcdef")])
    wire.svm(talk.tcp(12, b"new"))
    same_frames(wire.released(1), [talk.tcp(12, b"new")])


def test_a_retransmission_does_not_acknowledge_more_than_the_svm(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(1, b"x", ack=2000, window=900))
    assert told(wire.released(1)) == [(1000, 500)]
    wire.svm(talk.tcp(2, ack=2000, window=900))
    assert told(wire.released(1)) == [(2000, 900)]


def test_a_retransmission_with_new_bytes_waits_for_them(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(1, b"xyz"))
    assert wire.seen() == []
    wire.svm(talk.tcp(2, b"yz"))
    same_frames(wire.released(1), [talk.tcp(1, b"xyz")])


@pytest.mark.parametrize("flags", ["SA", "S"])
def test_a_repeated_syn_goes_out_at_once(wire: Wire, talk: Talk, flags: str) -> None:
    options = [("MSS", 1460), ("SAckOK", b"")]
    wire.pvm(talk.tcp(100, flags=flags, options=options))
    wire.svm(talk.tcp(900, flags=flags, options=options))
    same_frames(wire.released(1), [talk.tcp(100, flags=flags, options=options)])
    wire.pvm(talk.tcp(100, flags=flags, options=options))
    same_frames(wire.released(1), [talk.tcp(100, flags=flags, options=options)])
    wire.svm(talk.tcp(900, flags=flags, options=options))
    assert wire.seen() == []


def test_a_repeated_fin_goes_out_at_once(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(2, b"end", flags="FA"))
    wire.svm(talk.tcp(2, b"end", flags="FA"))
    same_frames(wire.released(1), [talk.tcp(2, b"end", flags="FA")])
    for frame in (talk.tcp(2, b"end", flags="FA"), talk.tcp(5, flags="FA")):
        wire.pvm(frame)
        same_frames(wire.released(1), [frame])
    wire.svm(talk.tcp(5, flags="FA"))
    assert wire.seen() == []


def test_an_svm_only_retransmission_is_swallowed(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(2, b"abcdef"))
    wire.svm(talk.tcp(2, b"abcdef"))
    wire.released(1)
    before = wire.nic()
    wire.svm(talk.tcp(2, b"abcdef"), talk.tcp(4, b"cd"), talk.tcp(1, b"x"))
    wire.expire()
    assert wire.seen() == []
    change = wire.nic().since(before)
    assert change["svm_swallowed"] == 3
    assert {name for name in change if name.startswith(("div", "timeouts", "high", "kicks"))} == set()


def test_a_new_connection_on_the_same_ports(wire: Wire, talk: Talk) -> None:
    """Each connection's numbers are its own, and nothing of the old one proves anything in the new."""
    for pvm, svm in ((100, 900), (5_000_000, 77), (2**32 - 1, 2**31), (3, 2**32 - 2)):
        wire.pvm(talk.tcp(pvm, flags="SA"))
        wire.svm(talk.tcp(svm, flags="SA"))
        same_frames(wire.released(1), [talk.tcp(pvm, flags="SA")])
        wire.svm(talk.tcp(pvm + 1, b"hello"))
        assert wire.seen() == []
        wire.pvm(talk.tcp(pvm + 1, b"hello"))
        same_frames(wire.released(1), [talk.tcp(pvm + 1, b"hello")])
        wire.pvm(talk.tcp(pvm + 6, flags="FA"))
        assert wire.seen() == []
        wire.svm(talk.tcp(pvm + 6, flags="FA"))
        same_frames(wire.released(1), [talk.tcp(pvm + 6, flags="FA")])


def test_a_new_connection_with_the_old_numbers_is_compared_again(wire: Wire, talk: Talk) -> None:
    for _ in range(3):
        frames = [talk.tcp(100, flags="SA"), talk.tcp(101, b"secret"), talk.tcp(107, flags="FA")]
        for frame, svm in zip(frames, [talk.tcp(900, flags="SA"), *frames[1:]], strict=True):
            wire.pvm(frame)
            assert wire.seen() == []
            wire.svm(svm)
            same_frames(wire.released(1), [frame])


def test_a_reset_ends_what_was_and_a_syn_begins_anew(wire: Wire, talk: Talk) -> None:
    open_stream(wire, talk)
    wire.pvm(talk.tcp(2, flags="RA"))
    assert wire.seen() == []
    wire.svm(talk.tcp(2, flags="RA"))
    same_frames(wire.released(1), [talk.tcp(2, flags="RA")])
    wire.pvm(talk.tcp(70_000, flags="SA"))
    assert wire.seen() == []
    wire.svm(talk.tcp(90_000, flags="SA"))
    same_frames(wire.released(1), [talk.tcp(70_000, flags="SA")])
    wire.pvm(talk.tcp(70_001, b"again"))
    wire.svm(talk.tcp(70_001, b"again"))
    same_frames(wire.released(1), [talk.tcp(70_001, b"again")])


def test_each_flow_waits_for_itself_alone(wire: Wire) -> None:
    talks = [Talk(wire, family=family) for family in (4, 6, 4)]
    for talk in talks:
        wire.pvm(talk.tcp(1, b"answer"))
    for talk in reversed(talks):
        wire.svm(talk.tcp(1, b"answer"))
        same_frames(wire.released(1), [talk.tcp(1, b"answer")])


def test_a_flow_met_in_the_middle_lets_nothing_below_its_first_packet_pass(wire: Wire) -> None:
    talk = Talk(wire)
    wire.svm(talk.tcp(5000, ack=1000))
    wire.pvm(talk.tcp(200, b"second", flags="PA"))
    wire.pvm(talk.tcp(100, b"first" * 20, flags="PA"))
    assert wire.released() == []
    wire.svm(talk.tcp(100, b"first" * 20), talk.tcp(200, b"second"))
    assert len(wire.released(2)) == 2
