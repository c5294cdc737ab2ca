"""Checkpoints and epochs: design.md section 5."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.packet import Raw

from coloebpf.lab.plan import PAIR
from coloebpf.model import State
from tests.lab.heard import Heard, same_frames
from tests.lab.talk import Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _clean(wire: Wire) -> Iterator[None]:
    yield
    for control in wire.control.values():
        control.set_deadline(PAIR, 0)
        control.set_state(PAIR, State.LOCKSTEP)
    wire.clean()
    status = wire.status()
    assert status["slots"]["free"] >= status["slots"]["total"] - 8  # a few are kept by each CPU
    assert (wire.nic()["held"], wire.nic()["parked"]) == (0, 0)


def tcp(talk: Talk, seq: int, data: bytes) -> bytes:
    return talk.tcp(seq, data)


def udp(talk: Talk, seq: int, data: bytes) -> bytes:
    return talk.udp(data)


BOTH = pytest.mark.parametrize("make", [tcp, udp])


@BOTH
def test_the_old_svm_proves_nothing_after_suspended(wire: Wire, talk: Talk, make: type) -> None:
    frame = make(talk, 1, b"answer")
    wire.pvm(frame)
    wire.suspend()
    before = wire.nic()
    wire.svm(frame)
    assert wire.seen() == []
    assert wire.nic().since(before)["dropped.old_epoch"] == 1
    wire.commit()
    same_frames(wire.released(1), [frame])  # by the commit, once
    wire.kick()
    assert wire.seen() == []


@BOTH
def test_what_the_old_svm_said_before_proves_nothing_later(wire: Wire, talk: Talk, make: type) -> None:
    """It was parked because it was ahead; the checkpoint made that SVM another one."""
    frame = make(talk, 1, b"answer")
    wire.svm(frame)
    wire.checkpoint()
    wire.pvm(frame)
    assert wire.seen() == []
    wire.svm(frame)
    same_frames(wire.released(1), [frame])


@BOTH
def test_output_between_suspended_and_committed_waits_for_proof(wire: Wire, talk: Talk, make: type) -> None:
    old, new = make(talk, 1, b"old"), make(talk, 4, b"new")
    wire.pvm(old)
    wire.suspend()
    wire.pvm(new)
    assert wire.seen() == []
    wire.commit()
    same_frames(wire.released(1), [old])
    wire.svm(new)
    same_frames(wire.released(1), [new])


@BOTH
def test_new_output_may_come_back_before_the_flush_is_through(wire: Wire, talk: Talk, make: type) -> None:
    old, new = make(talk, 1, b"old"), make(talk, 4, b"new")
    wire.pvm(old)
    wire.suspend()
    wire.pvm(new)
    wire.control["primary"].set_state(PAIR, State.LOCKSTEP)  # committed; the walk over the flows has not come here yet
    wire.svm(new)
    same_frames(wire.released(2), [old, new])


def test_an_ack_of_the_new_svm_may_come_before_the_flush(wire: Wire, talk: Talk) -> None:
    before = wire.nic()
    wire.pvm(talk.tcp(1, b"old"))
    wire.suspend()
    wire.control["primary"].set_state(PAIR, State.LOCKSTEP)
    wire.svm(talk.tcp(4, ack=1000))
    wire.kick()
    same_frames(wire.released(1), [talk.tcp(1, b"old")])
    wire.pvm(talk.tcp(4, b"new"))
    assert wire.seen() == []
    wire.svm(talk.tcp(4, b"new"))
    same_frames(wire.released(1), [talk.tcp(4, b"new")])
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)
    assert {name for name in change if name.startswith("divergences")} == set()


@BOTH
def test_what_the_old_svm_had_parked_does_not_swallow_the_new_ones(wire: Wire, talk: Talk, make: type) -> None:
    wire.pvm(talk.tcp(1, b"x"))
    wire.svm(talk.tcp(1, b"x"))
    assert len(wire.released(1)) == 1
    frame = make(talk, 2, b"answer")
    wire.svm(frame)
    wire.suspend()
    wire.control["primary"].set_state(PAIR, State.LOCKSTEP)
    wire.svm(frame)
    wire.kick()
    wire.pvm(frame)
    same_frames(wire.released(1), [frame])


@BOTH
def test_the_next_pvm_packet_finds_the_commit_too(wire: Wire, talk: Talk, make: type) -> None:
    old, new = make(talk, 1, b"old"), make(talk, 4, b"new")
    wire.pvm(old)
    wire.suspend()
    wire.control["primary"].set_state(PAIR, State.LOCKSTEP)
    wire.pvm(new)
    wire.kick()
    same_frames(wire.released(1), [old])
    wire.svm(new)
    same_frames(wire.released(1), [new])


@BOTH
def test_a_checkpoint_that_failed_flushes_nothing_and_the_next_covers_both(wire: Wire, talk: Talk, make: type) -> None:
    frames = [make(talk, 1, b"one"), make(talk, 4, b"two"), make(talk, 7, b"six")]
    wire.pvm(frames[0])
    wire.suspend()
    wire.pvm(frames[1])
    wire.suspend()  # the first failed
    wire.pvm(frames[2])
    assert wire.seen() == []
    wire.commit()
    same_frames(wire.released(2), frames[:2])
    wire.svm(frames[2])
    same_frames(wire.released(1), frames[2:])


@BOTH
def test_a_flush_keeps_the_order(wire: Wire, make: type) -> None:
    talks = [Talk(wire), Talk(wire, family=6), Talk(wire, tags=[("q", 2)])]
    sent = {i: [make(talk, 1 + 3 * n, b"%03d" % n) for n in range(200)] for i, talk in enumerate(talks)}
    for row in zip(*sent.values(), strict=True):
        for frame in row:
            wire.push("pvm", frame)
    wire.settle()
    assert wire.seen() == []
    wire.checkpoint()
    got = wire.released(600)
    assert len(got) == 600
    for frames in sent.values():
        same_frames([f for f in got if f in set(frames)], frames)


def test_a_stream_half_matched_at_the_checkpoint(wire: Wire, talk: Talk) -> None:
    wire.pvm(talk.tcp(1, b"abcdef"))
    wire.svm(talk.tcp(1, b"abc"))
    wire.checkpoint()
    same_frames(wire.released(1), [talk.tcp(1, b"abcdef")])
    wire.svm(talk.tcp(4, b"def"))  # late, below the released position
    assert wire.nic()["parked"] == 0
    wire.pvm(talk.tcp(7, b"ghi"))
    assert wire.seen() == []
    wire.svm(talk.tcp(4, b"def"), talk.tcp(7, b"ghi"))
    same_frames(wire.released(1), [talk.tcp(7, b"ghi")])


def test_a_handshake_that_a_checkpoint_cuts_in_two(wire: Wire, talk: Talk) -> None:
    wire.pvm(talk.tcp(100, flags="SA"))
    wire.checkpoint()
    same_frames(wire.released(1), [talk.tcp(100, flags="SA")])
    wire.svm(talk.tcp(100, flags="SA"))  # the copy sends it again, with the PVM's number now
    wire.pvm(talk.tcp(100, flags="SA"))
    same_frames(wire.released(1), [talk.tcp(100, flags="SA")])
    wire.pvm(talk.tcp(101, b"hello"))
    assert wire.seen() == []
    wire.svm(talk.tcp(101, b"hello"))
    same_frames(wire.released(1), [talk.tcp(101, b"hello")])
    assert wire.nic()["parked"] == 0


def test_a_matched_handshake_repeated_by_the_copy(wire: Wire, talk: Talk) -> None:
    wire.pvm(talk.tcp(100, flags="SA"))
    wire.svm(talk.tcp(900, flags="SA"))
    same_frames(wire.released(1), [talk.tcp(100, flags="SA")])
    wire.checkpoint()
    wire.svm(talk.tcp(100, flags="SA"))
    wire.pvm(talk.tcp(101, b"hello"))
    wire.svm(talk.tcp(101, b"hello"))
    same_frames(wire.released(1), [talk.tcp(101, b"hello")])


def test_fragments_across_a_checkpoint(wire: Wire) -> None:
    """Half a datagram before, half after: the second half does not complete the first."""
    talk = Talk(wire)
    halves = [
        bytes(talk.ip(id=5, flags="MF", proto=17) / Raw(b"12345678")),
        bytes(talk.ip(id=5, frag=1, proto=17) / Raw(b"abcdefgh")),
    ]
    wire.pvm(halves[0])
    wire.suspend()
    wire.pvm(halves[1])
    wire.commit()
    same_frames(wire.released(1), halves[:1])
    wire.svm(*halves)
    assert wire.seen() == []  # the SVM's datagram is whole, the PVM's is not: a matter for the next checkpoint
    wire.checkpoint()
    same_frames(wire.released(1), halves[1:])


def test_acks_after_a_checkpoint(wire: Wire, talk: Talk) -> None:
    """The new SVM has received all that the PVM had acknowledged."""
    wire.pvm(talk.tcp(1, b"x", ack=1000))
    wire.svm(talk.tcp(1, b"x", ack=1000))
    wire.released(1)
    wire.pvm(talk.tcp(2, ack=5000))
    assert wire.seen() == []
    wire.checkpoint()
    same_frames(wire.released(1), [talk.tcp(2, ack=5000)])
    wire.pvm(talk.tcp(2, ack=5000), talk.tcp(2, ack=5001))
    same_frames(wire.released(1), [talk.tcp(2, ack=5000)])
    wire.svm(talk.tcp(2, ack=5001))
    same_frames(wire.released(1), [talk.tcp(2, ack=5001)])


@pytest.mark.parametrize("told", [True, False], ids=["the client was told less", "the client was told nothing"])
def test_an_ack_of_the_old_svm_is_none_of_the_new_ones(wire: Wire, talk: Talk, told: bool) -> None:
    """The old SVM was ahead. The new one is the PVM, and has not received what came to the old one alone."""
    if told:
        wire.pvm(talk.tcp(1, b"x", ack=1000))
        wire.svm(talk.tcp(1, b"x", ack=1000))
        assert len(wire.released(1)) == 1
    else:
        wire.svm(talk.tcp(1, b"x", ack=1000))
    wire.svm(talk.tcp(2, ack=5000))
    wire.checkpoint()
    wire.pvm(talk.tcp(2, ack=5000))
    assert wire.seen() == []
    wire.svm(talk.tcp(2, ack=5000))
    same_frames(wire.released(1), [talk.tcp(2, ack=5000)])


def test_sack_blocks_of_the_old_svm_are_none_of_the_new_ones(wire: Wire, talk: Talk) -> None:
    wire.pvm(talk.tcp(1, b"x", ack=1000))
    wire.svm(talk.tcp(1, b"x", ack=1000))
    assert len(wire.released(1)) == 1
    both = talk.tcp(2, ack=1000, options=[("NOP", None), ("NOP", None), ("SAck", (3000, 4000))])
    wire.svm(both)
    wire.checkpoint()
    wire.pvm(both)
    assert [Heard.of(frame).sack for frame in wire.released(1)] == [[]]


def test_the_pvms_order_while_nothing_is_compared(wire: Wire, talk: Talk) -> None:
    """What fills a hole may come behind it in a checkpoint too."""
    wire.pvm(talk.tcp(1, b"x"))
    wire.svm(talk.tcp(1, b"x"))
    assert len(wire.released(1)) == 1
    wire.suspend()
    frames = [talk.tcp(5, b"late"), talk.tcp(2, b"one")]
    wire.pvm(*frames)
    wire.commit()
    assert wire.seen() == []
    wire.svm(talk.tcp(2, b"one"), talk.tcp(5, b"late"))
    same_frames(wire.released(2), frames)
