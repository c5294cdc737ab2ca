"""States of a pair and the deadline of its right to speak: design.md section 7."""

from __future__ import annotations

import ctypes as ct
import time
from collections.abc import Callable, Iterator

import pytest
from scapy.layers.l2 import ARP, Ether

from coloebpf import bpfsys
from coloebpf.lab.plan import PAIR
from coloebpf.model import State
from coloebpf.service import beat_frames
from tests.lab.heard import same_frames
from tests.lab.talk import Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab

COOKIE = b"a primary's peer"
QUIET_FLOWS = 5


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


# ---- the secondary ----


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


def beat(wire: Wire) -> None:
    wire.control["primary"].expect_beats(COOKIE)
    wire.push("secondary", beat_frames.frame(b"\2\0\0\0\0\1", 0, COOKIE, 1, 0), wire.plan.nic_list()[0].fwd)


def guest_arp(wire: Wire) -> None:
    nic = wire.nics[0]
    frame = Ether(src=nic.mac, dst=wire.client_mac) / ARP(op=2, hwsrc=nic.mac, psrc=nic.guest_v4, pdst=nic.client_v4)
    wire.pvm(bytes(frame))


@pytest.mark.parametrize("trigger", [beat, guest_arp])
@BOTH
def test_without_a_service_quiet_flows_are_let_go(wire: Wire, make: type, trigger: Callable[[Wire], None]) -> None:
    """`on_service_loss = "open"`: nobody runs the flush, and the flows that hold something send nothing more."""
    talks = [Talk(wire) for _ in range(QUIET_FLOWS)]
    frames = [make(talk, 1, b"%04d" % n) for n, talk in enumerate(talks)]
    wire.pvm(*frames)
    assert wire.seen() == []
    control = wire.control["primary"]
    bpfsys.update(control.fd("walks"), ct.c_uint32(0), ct.c_uint64(0))  # the last test's was no second ago, maybe
    control.set_open_after(PAIR, 1)
    try:
        trigger(wire)
        got = wire.released(QUIET_FLOWS + (trigger is guest_arp))
        same_frames(sorted(f for f in got if f[12:14] != b"\x08\x06"), sorted(frames))
    finally:
        control.set_open_after(PAIR, 0)
