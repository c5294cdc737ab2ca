"""What programs do for the service: note its peer's heartbeats on fwd, and go on without it if that is its policy."""

from __future__ import annotations

import ctypes as ct
import os
import time
from collections.abc import Iterator

import pytest

from coloebpf import bpfsys
from coloebpf.errors import ConfigError
from coloebpf.model import FwdBeat, State
from coloebpf.service.beat_frames import frame
from tests.unit.rig import DROP, PASS, XDP_DROP, XDP_PASS, Rig, next_port, udp

pytestmark = pytest.mark.kernel

SOURCE = bytes.fromhex("02c010030101")
NEVER_NS = 1 << 62


@pytest.fixture
def cookie(rig: Rig) -> Iterator[bytes]:
    value = os.urandom(16)
    rig.control.expect_beats(value)
    yield value
    rig.control.expect_beats(bytes(16))


def test_a_beat_is_noted_and_goes_no_further(rig: Rig, cookie: bytes) -> None:
    before = time.monotonic_ns()
    assert rig.arrive(frame(SOURCE, 0, cookie, 7, 3)).verdict == XDP_DROP
    beat = rig.control.fwd_beats()[0]
    assert (beat.cookie, beat.number, beat.echo) == (cookie, 7, 3)
    assert before <= beat.last_ns <= time.monotonic_ns()


def test_a_beat_wraps_its_numbers(rig: Rig, cookie: bytes) -> None:
    rig.arrive(frame(SOURCE, 0, cookie, 0xFFFFFFFF, 0xFFFFFFFE))
    beat = rig.control.fwd_beats()[0]
    assert (beat.number, beat.echo) == (0xFFFFFFFF, 0xFFFFFFFE)


def test_a_stranger_is_counted_and_nothing_else(rig: Rig, cookie: bytes) -> None:
    rig.arrive(frame(SOURCE, 0, cookie, 7, 3))
    known = rig.control.fwd_beats()[0]
    for other in (
        bytes(16),
        os.urandom(16),
        cookie[:15] + bytes([cookie[15] ^ 1]),
        bytes([cookie[0] ^ 1]) + cookie[1:],
    ):
        assert rig.arrive(frame(SOURCE, 0, other, 9, 9)).verdict == XDP_DROP
    assert rig.control.fwd_beats()[0] == FwdBeat(known.last_ns, known.cookie, known.counter, known.strangers + 4)


def test_without_a_known_peer_no_cookie_is_right(rig: Rig) -> None:
    rig.control.expect_beats(bytes(16))
    before = rig.control.fwd_beats().get(0, FwdBeat(0, bytes(16), 0, 0))
    rig.arrive(frame(SOURCE, 0, bytes(16), 1, 1))
    assert rig.control.fwd_beats()[0] == FwdBeat(before.last_ns, before.cookie, before.counter, before.strangers + 1)


@pytest.mark.parametrize("change", [(14, b"X"), (18, b"\2"), (12, b"\x88\xb6")], ids=["magic", "version", "ethertype"])
def test_what_is_no_beat_is_a_frame_like_any_other(rig: Rig, cookie: bytes, change: tuple[int, bytes]) -> None:
    before = rig.control.fwd_beats()
    at, text = change
    other = bytearray(frame(rig_mac(rig), 0, cookie, 1, 1))
    other[at : at + len(text)] = text
    assert rig.arrive(bytes(other)).verdict == XDP_PASS  # the SVM's, compared as a whole frame
    assert rig.control.fwd_beats() == before


def test_a_cut_beat_is_none(rig: Rig, cookie: bytes) -> None:
    before = rig.control.fwd_beats()
    rig.arrive(frame(SOURCE, 0, cookie, 1, 1)[:42])
    assert rig.control.fwd_beats() == before


def test_a_cookie_has_its_length(rig: Rig) -> None:
    with pytest.raises(ConfigError, match="16 bytes, not 3"):
        rig.control.expect_beats(b"abc")


def rig_mac(rig: Rig) -> bytes:
    """The guest's, as the NIC has it."""
    value = rig.control.shapes.leaf("nic_by_id")()
    bpfsys.lookup(rig.control.fd("nic_by_id"), ct.c_uint32(0), value)
    return bytes(value.mac)


LOSS_BY_STATE = [
    (State.LOCKSTEP, PASS),
    (State.CHECKPOINTING, PASS),
    (State.UNPROTECTED, PASS),
    (State.PASSTHROUGH, PASS),
    (State.HALTED, DROP),
    (State.PROMOTED, DROP),
]


@pytest.mark.parametrize(("state", "verdict"), LOSS_BY_STATE, ids=lambda x: x.name if isinstance(x, State) else "")
def test_a_primary_goes_on_without_its_service(rig: Rig, state: State, verdict: int) -> None:
    rig.control.set_state(0, state)
    try:
        rig.control.set_open_after(0, 1)
        assert rig.output(udp(next_port(), b"nobody watches")) == verdict
    finally:
        rig.control.set_open_after(0, 0)


@pytest.mark.parametrize("at_ns", [0, NEVER_NS])
def test_until_then_it_holds(rig: Rig, at_ns: int) -> None:
    try:
        rig.control.set_open_after(0, at_ns)
        before = rig.counters()
        assert rig.output(udp(next_port(), b"somebody watches")) == DROP
        assert rig.since(before) == {"held_packets": 1}
    finally:
        rig.control.set_open_after(0, 0)


def test_a_lost_lease_is_above_a_lost_service(rig: Rig) -> None:
    try:
        rig.control.set_open_after(0, 1)
        rig.control.set_deadline(0, 1)
        before = rig.counters()
        assert rig.output(udp(next_port(), b"may not speak")) == DROP
        assert rig.since(before) == {"dropped.halted": 1}
    finally:
        rig.control.set_open_after(0, 0)
        rig.control.set_deadline(0, 0)


def test_what_was_held_leaves_first(rig: Rig) -> None:
    """The flow's next packet finds the service gone: it stays behind what is held, and both leave."""
    port = next_port()
    assert rig.output(udp(port, b"one")) == DROP
    before = rig.counters()
    try:
        rig.control.set_open_after(0, 1)
        rig.output(udp(port, b"two"))
        rig.control.kick()
    finally:
        rig.control.set_open_after(0, 0)
    assert rig.since(before)["unheld_packets"] == 2


def test_a_secondary_does_not_care(rig: Rig) -> None:
    """Its SVM's output goes to the primary as before."""
    rig.control.set_open_after(1, 1)
    try:
        before = rig.counters(1)
        rig.run("s2_output", udp(next_port(), b"svm"), "vif1")
        assert "dropped.halted" not in rig.since(before, 1)
    finally:
        rig.control.set_open_after(1, 0)
