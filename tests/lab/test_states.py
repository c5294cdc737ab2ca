"""Checkpoints and epochs, states of a pair and the deadline of its right to speak: design.md sections 5 and 7."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from scapy.packet import Raw

from coloebpf.lab.plan import PAIR
from coloebpf.model import State
from tests.lab.conftest import LabMaker
from tests.lab.wire import KINDS, Talk, Wire, same_frames

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def wire(make_module_lab: LabMaker) -> Iterator[Wire]:
    wire = Wire(make_module_lab(guests="none").plan)
    yield wire
    wire.close()


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


@pytest.fixture(params=KINDS)
def talk(request: pytest.FixtureRequest, wire: Wire) -> Talk:
    return Talk(wire, **KINDS[request.param])


def tcp(talk: Talk, seq: int, data: bytes) -> bytes:
    return talk.tcp(seq, data)


def udp(talk: Talk, seq: int, data: bytes) -> bytes:
    return talk.udp(data)


BOTH = pytest.mark.parametrize("make", [tcp, udp])


# ---- checkpoints -------------------------------------------------------------------------------------------------------


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


# ---- states ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.UNPROTECTED, State.SYNCING])
@BOTH
def test_without_protection_output_passes(wire: Wire, talk: Talk, make: type, state: State) -> None:
    frame, control, before = make(talk, 1, b"free"), wire.control["primary"], wire.nic()
    control.set_state(PAIR, state)
    wire.pvm(frame)
    same_frames(wire.released(1), [frame])
    wire.svm(frame)
    assert wire.seen() == []
    change = wire.nic().since(before)
    assert (change["unprotected"], change["dropped.state"], change["held"], change["parked"]) == (1, 1, 0, 0)
    control.set_state(PAIR, State.LOCKSTEP)
    wire.pvm(make(talk, 5, b"no more"))
    assert wire.seen() == []


@BOTH
def test_checkpointing_holds(wire: Wire, talk: Talk, make: type) -> None:
    frame = make(talk, 1, b"wait")
    wire.control["primary"].set_state(PAIR, State.CHECKPOINTING)
    wire.pvm(frame)
    wire.svm(frame)
    wire.kick()
    assert wire.seen() == []
    wire.control["primary"].set_state(PAIR, State.LOCKSTEP)
    assert wire.seen() == []
    wire.svm(frame)
    same_frames(wire.released(1), [frame])


@BOTH
def test_passthrough_releases_everything_in_order(wire: Wire, talk: Talk, make: type) -> None:
    frames = [make(talk, 1 + 3 * n, b"%03d" % n) for n in range(6)]
    wire.pvm(*frames[:3])
    wire.svm(make(talk, 1, b"xxx"))  # held for a divergence, or for want of proof: all the same
    wire.control["primary"].set_state(PAIR, State.PASSTHROUGH)
    wire.pvm(frames[3])
    wire.kick()
    same_frames(wire.released(4), frames[:4])
    wire.pvm(*frames[4:])
    same_frames(wire.released(2), frames[4:])
    before = wire.nic()
    wire.svm(frames[5])
    assert wire.seen() == []
    assert wire.nic().since(before)["dropped.state"] == 1


def test_passthrough_sends_acks_and_windows_as_they_are(wire: Wire, talk: Talk) -> None:
    wire.control["primary"].set_state(PAIR, State.PASSTHROUGH)
    frame = talk.tcp(1, b"data", ack=7777, window=321)
    wire.pvm(frame)
    assert [f.hex() for f in wire.released(1)] == [frame.hex()]


def test_passthrough_of_what_was_held_keeps_its_acks(wire: Wire, talk: Talk) -> None:
    frame = talk.tcp(1, b"data", ack=7777, window=321)
    wire.pvm(frame)
    wire.control["primary"].set_state(PAIR, State.PASSTHROUGH)
    wire.kick()
    assert [f.hex() for f in wire.released(1)] == [frame.hex()]


@pytest.mark.parametrize("state", [State.HALTED, State.PROMOTED])
@BOTH
def test_halted_says_nothing(wire: Wire, talk: Talk, make: type, state: State) -> None:
    held, refused, control = make(talk, 1, b"held"), make(talk, 5, b"refused"), wire.control["primary"]
    wire.pvm(held)
    control.set_state(PAIR, state)
    before = wire.nic()
    wire.pvm(refused)
    wire.svm(held)
    wire.kick()
    assert wire.seen() == []
    change = wire.nic().since(before)
    assert (change["dropped.halted"], change["dropped.state"] + change["dropped.old_epoch"]) == (1, 1)
    control.set_state(PAIR, State.LOCKSTEP)
    wire.svm(held)
    same_frames(wire.released(1), [held])


@BOTH
def test_a_right_to_speak_that_ran_out(wire: Wire, talk: Talk, make: type) -> None:
    """No process has to act: the next packet finds the deadline passed. A new deadline goes on where it stopped."""
    held, refused, control = make(talk, 1, b"held"), make(talk, 5, b"refused"), wire.control["primary"]
    control.set_deadline(PAIR, time.monotonic_ns() + 10**12)
    wire.pvm(held)
    control.set_deadline(PAIR, time.monotonic_ns() - 1)
    before = wire.nic()
    wire.pvm(refused)
    wire.svm(held)
    wire.kick()
    assert wire.seen() == []
    assert wire.nic().since(before)["dropped.halted"] == 1
    control.set_deadline(PAIR, time.monotonic_ns() + 10**12)
    wire.svm(held)
    same_frames(wire.released(1), [held])


@BOTH
def test_the_deadline_is_above_every_state(wire: Wire, talk: Talk, make: type) -> None:
    control = wire.control["primary"]
    control.set_deadline(PAIR, 1)
    for state in State:
        control.set_state(PAIR, state)
        wire.pvm(make(talk, 1, b"no"))
        assert wire.seen() == []


@pytest.mark.parametrize(
    ("state", "copies"),
    [(State.SYNCING, 1), (State.LOCKSTEP, 1), (State.CHECKPOINTING, 1), (State.UNPROTECTED, 0), (State.PASSTHROUGH, 0)],
)
def test_who_hears_the_client(wire: Wire, talk: Talk, state: State, copies: int) -> None:
    frame = talk.udp(b"question", output=False)
    wire.control["primary"].set_state(PAIR, state)
    wire.client(frame)
    assert [f.hex() for f in wire.await_frames("pvm", 1)] == [frame.hex()]
    assert [f.hex() for f in wire.await_frames("svm", copies)] == [frame.hex()] * copies


# ---- the secondary -----------------------------------------------------------------------------------------------------


def test_a_promoted_secondary_speaks_and_hears_for_itself(wire: Wire, talk: Talk) -> None:
    wire.control["primary"].set_state(PAIR, State.HALTED)
    wire.control["secondary"].set_state(PAIR, State.PROMOTED)
    wire.svm(talk.udp(b"here now"))
    same_frames(wire.released(1), [talk.udp(b"here now")])
    wire.client(talk.udp(b"hello", output=False))
    assert [f.hex() for f in wire.await_frames("svm", 1)] == [talk.udp(b"hello", output=False).hex()]
    wire.control["secondary"].set_state(PAIR, State.LOCKSTEP)
    wire.control["primary"].set_state(PAIR, State.PASSTHROUGH)
    wire.pvm(talk.udp(b"back"))  # the switch learns where the guest is


def test_a_secondary_in_lockstep_is_heard_by_nobody(wire: Wire, talk: Talk) -> None:
    before = wire.nic(host="secondary")
    wire.client(talk.udp(b"hello", output=False))
    assert len(wire.await_frames("svm", 1)) == 1  # by the forward link, not by its own bridge
    wire.svm(talk.udp(b"answer"))
    assert wire.seen() == []
    assert wire.nic(host="secondary").since(before)["svm_output"] == 1
    wire.pvm(talk.udp(b"answer"))
    same_frames(wire.released(1), [talk.udp(b"answer")])


@pytest.mark.parametrize("state", [State.HALTED, State.UNPROTECTED, State.PASSTHROUGH])
def test_a_secondary_without_a_part_is_silent(wire: Wire, talk: Talk, state: State) -> None:
    wire.control["secondary"].set_state(PAIR, state)
    wire.svm(talk.udp(b"answer"))
    wire.client(talk.udp(b"hello", output=False))
    wire.pvm(talk.udp(b"answer"))
    assert wire.seen() == []
    assert wire.seen("svm") == []
    wire.control["secondary"].set_state(PAIR, State.LOCKSTEP)
    wire.svm(talk.udp(b"answer"))
    same_frames(wire.released(1), [talk.udp(b"answer")])


def test_a_secondary_whose_right_ran_out_is_silent(wire: Wire, talk: Talk) -> None:
    control = wire.control["secondary"]
    control.set_state(PAIR, State.PROMOTED)
    control.set_deadline(PAIR, 1)
    before = wire.nic(host="secondary")
    wire.svm(talk.udp(b"answer"))
    assert wire.seen() == []
    assert wire.nic(host="secondary").since(before)["dropped.halted"] == 1
