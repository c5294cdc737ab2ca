"""For how long S1 and S2 know a connection's numbers after it has ended, or seems to have."""

from __future__ import annotations

import ctypes as ct
import time

import pytest

from coloebpf import bpfsys
from tests.unit.rig import Rig
from tests.unit.test_translate import CLIENT_ISN, PVM_ISN, Connection

pytestmark = pytest.mark.kernel

CLOSED_S, UNACKED_S = 10, 130  # IDLE_CLOSED, and LINGER_S on top, of bpf/constants.h


def known_after(rig: Rig, seconds: float) -> bool:
    """Whether a sweep leaves the only flow there when nothing has come for so long."""
    fd = rig.control.fd("flows")
    for index in range(rig.flow_top()):
        flow = rig.flow(index)
        if flow.flags & 1:
            flow.last_ns -= int(seconds * 1e9)
            bpfsys.update(fd, ct.c_uint32(index), flow)
    rig.control.sweep()
    return bool(rig.flows())


def kept_until(rig: Rig, limit_s: float, margin_s: float = 1.0) -> bool:
    """Whether a sweep so long before `limit_s` leaves the flow there.

    Also if the machine stood still for longer than that: then the flow is too old, and nothing is shown.
    """
    begin = min(flow.last_ns for flow in rig.flows())
    return known_after(rig, limit_s - margin_s) or time.monotonic_ns() - begin > margin_s * 1e9


def closing(rig: Rig) -> Connection:
    """Both sides have said FIN behind some data of the guest's, which are not acknowledged yet."""
    c = Connection(rig)
    c.open()
    c.svm(1, b"the end", "FPA", ack=CLIENT_ISN + 1)
    assert c.client(1, flags="FA", ack=PVM_ISN + 1) is not None
    return c


def test_a_connection_that_ended_is_soon_forgotten(rig: Rig) -> None:
    c = closing(rig)
    assert c.client(2, ack=PVM_ISN + 9) is not None
    assert kept_until(rig, CLOSED_S)
    assert not known_after(rig, 2)


@pytest.mark.parametrize("early", [False, True])
def test_the_clients_word_counts_whenever_it_came(rig: Rig, early: bool) -> None:
    """The SVM may be behind the PVM."""
    c = Connection(rig)
    c.open()
    if early:
        assert c.client(1, flags="FA", ack=PVM_ISN + 2) is not None
    c.svm(1, flags="FA", ack=CLIENT_ISN + 1)
    if not early:
        assert c.client(1, flags="FA", ack=PVM_ISN + 2) is not None
    assert not known_after(rig, CLOSED_S + 1)


def test_what_the_client_has_not_acknowledged_is_said_again_in_its_numbers(rig: Rig) -> None:
    """The primary has died with it, and while its host is fenced the SVM's timeouts grow beyond ten seconds."""
    c = closing(rig)
    assert kept_until(rig, UNACKED_S, UNACKED_S - 2 * CLOSED_S)
    assert c.svm(1, b"the end", "FPA", ack=CLIENT_ISN + 1).seq == PVM_ISN + 1
    assert not known_after(rig, UNACKED_S + 1)


@pytest.mark.parametrize(
    ("ahead", "believed"), [(0, True), (1000, True), (-1, False), (2**24, False), (2**31, False)], ids=str
)
def test_a_reset_that_the_guest_ignores_ends_nothing(rig: Rig, ahead: int, believed: bool) -> None:
    """Out of its window (RFC 5961): an old one, or somebody has guessed."""
    c = Connection(rig)
    c.open()
    c.svm(1, b"x", ack=CLIENT_ISN + 1)
    c.client(1 + ahead, flags="R", ack=0)
    assert known_after(rig, CLOSED_S + 1) is not believed


def test_the_guests_own_reset_ends_it(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    c.svm(1, flags="RA", ack=CLIENT_ISN + 1)
    assert not known_after(rig, CLOSED_S + 1)
