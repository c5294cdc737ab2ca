"""How long a connection keeps its place in the primary's table, and after a protection has begun anew in both tables."""

from __future__ import annotations

import socket

import pytest

from coloebpf.model import State
from tests.fence import pass_all_cpus
from tests.unit.rig import DROP, PASS, Rig, next_port, tcp
from tests.unit.test_translate import PVM_ISN, Connection
from tests.unit.test_translate_ends import kept_until, known_after

pytestmark = pytest.mark.kernel

CLOSED_S, HALF_OPEN_S = 10, 60  # IDLE_CLOSED and IDLE_HALF_OPEN of bpf/constants.h


def svm_sends(frame: bytes) -> None:
    """Through XDP and the device's own stack to P4."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as port:
        port.bind(("fwd0p", 0))
        port.send(frame)
    pass_all_cpus()


def both_send(rig: Rig, port: int, seq: int, data: bytes = b"", flags: str = "A") -> None:
    """The SVM first, then the PVM, whose packet may leave."""
    svm_sends(tcp(port, seq, data, flags))
    assert rig.output(tcp(port, seq, data, flags)) == PASS


@pytest.fixture
def port(rig: Rig) -> int:
    """Of an established connection, the only flow of the primary's."""
    port = next_port()
    assert rig.output(tcp(port, 1, b"x")) == DROP
    rig.control.suspend(0)
    assert rig.control.commit(0) == 1
    both_send(rig, port, 2, b"hello")
    return port


def test_an_established_connection_is_not_forgotten(rig: Rig, port: int) -> None:
    assert known_after(rig, 4 * 86400)


def test_one_that_has_ended_is(rig: Rig, port: int) -> None:
    both_send(rig, port, 7, flags="FA")
    assert kept_until(rig, CLOSED_S)
    assert not known_after(rig, 2)


@pytest.mark.parametrize("flags", ["FA", "R", ""], ids=["closed", "reset", "still-there"])
def test_a_new_protection_expects_no_word_of_the_connections_before_it(rig: Rig, port: int, flags: str) -> None:
    """Each may have ended while nobody looked; one that has not begins anew with its next segment."""
    if flags:
        both_send(rig, port, 7, flags=flags)
    rig.control.set_state(0, State.UNPROTECTED)
    rig.control.set_state(0, State.SYNCING)
    rig.control.suspend(0)
    rig.control.commit(0)
    assert not known_after(rig, HALF_OPEN_S + 1)


def test_a_bare_ack_of_no_known_connection_opens_none(rig: Rig) -> None:
    """A guest answers a late FIN of what has ended long ago."""
    port = next_port()
    assert rig.output(tcp(port, 1)) == DROP
    svm_sends(tcp(port, 1))
    assert kept_until(rig, HALF_OPEN_S)
    assert not known_after(rig, 2)


def test_a_guest_that_only_receives_has_an_open_connection(rig: Rig) -> None:
    port = next_port()
    both_send(rig, port, 100, flags="SA")
    both_send(rig, port, 101)
    assert known_after(rig, 4 * 86400)


def test_a_secondary_forgets_what_it_knew_before_a_new_protection(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    assert c.client(1, b"x", ack=PVM_ISN + 1) is not None
    rig.control.set_state(1, State.UNPROTECTED)
    rig.control.clear_translations(1)
    rig.control.set_state(1, State.SYNCING)
    assert kept_until(rig, HALF_OPEN_S)
    assert not known_after(rig, 2)


def test_but_not_what_it_learns_in_it(rig: Rig) -> None:
    rig.control.set_state(1, State.SYNCING)
    c = Connection(rig)
    c.open()
    assert c.client(1, b"x", ack=PVM_ISN + 1) is not None
    assert known_after(rig, 4 * 86400)
