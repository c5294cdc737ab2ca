"""Ports used again end an entry on the next secondary too, where the guest's own SYN may never be seen."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Callable

import pytest

from coloebpf import bpfsys
from coloebpf.aliases import Aliases
from coloebpf.model import State
from tests.unit.conftest import SPECS
from tests.unit.rig import PASS, Rig, tcp
from tests.unit.test_aliases import KNOWN, NIC, OWN, aliases, anew, become_primary, promoted, text_of, texts_of
from tests.unit.test_translate import CLIENT_ISN, M32, PVM_ISN, SVM_ISN, Connection, checked

pytestmark = pytest.mark.kernel

__all__ = ["aliases"]  # a fixture

LATER = 5_000_000  # from the first connection's ISN to the second one's, on the client's side


def handed(rig: Rig, aliases: Aliases, state: State = State.LOCKSTEP) -> Connection:
    """A connection of which the secondary knows by the primary's word alone."""
    c = Connection(rig)
    anew(aliases, [text_of(c.port)])
    rig.control.set_state(1, state)
    return c


@pytest.mark.parametrize("flags", ["S", "SA"])
@pytest.mark.parametrize("state", [State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING], ids=lambda s: s.name)
def test_the_client_tells(rig: Rig, aliases: Aliases, state: State, flags: str) -> None:
    """The PVM has answered, or asked, and the SVM is a copy that has nothing to add."""
    c = handed(rig, aliases, state)
    c.client(LATER, flags=flags, ack=0 if flags == "S" else 9)
    assert texts_of(aliases) != [], "the guest may refuse it"
    rig.control.clear_translations(1)
    rig.control.settle_translations(1)
    ack = c.client(LATER + 1, ack=9)
    assert ack is not None
    assert texts_of(aliases) == []


NOTHING: dict[str, Callable[[Connection], object]] = {
    "a SYN alone": lambda c: c.client(LATER, flags="S", ack=0),
    "no SYN before": lambda c: c.client(LATER + 1),
    "the connection's own SYN once more": lambda c: (c.client(0, flags="S", ack=0), c.client(1)),
    "and its own SYN-ACK": lambda c: (c.client(0, flags="SA"), c.client(1)),
    "what goes on elsewhere": lambda c: (c.client(LATER, flags="S", ack=0), c.client(1), c.client(LATER + 2)),
    "a reset": lambda c: (c.client(LATER, flags="S", ack=0), c.client(LATER + 1, flags="RA")),
    "the guest goes on": lambda c: (
        c.client(LATER, flags="S", ack=0),
        c.svm(1, ack=CLIENT_ISN + 1),
        c.client(LATER + 1),
    ),
}


@pytest.mark.parametrize("does", NOTHING.values(), ids=NOTHING)
def test_nothing_less_ends_it(rig: Rig, aliases: Aliases, does: Callable[[Connection], object]) -> None:
    does(handed(rig, aliases))
    assert len(texts_of(aliases)) == 1


def test_a_promotion_in_between(rig: Rig, aliases: Aliases) -> None:
    """The client's ACK meets the SVM as the guest: a copy of the PVM that had taken the SYN."""
    c = handed(rig, aliases)
    c.client(LATER, flags="S", ack=0)
    rig.control.clear_translations(1)
    rig.control.settle_translations(1)
    rig.control.set_state(1, State.PROMOTED)
    segment = tcp(c.port, CLIENT_ISN + LATER + 1, b"q", ack=9, output=False)
    run = rig.run("s3_isolate", segment, "vif1")
    assert (run.retval, checked(run.data).ack) == (PASS, 9)
    assert c.svm(0, b"x", verdict=PASS, ack=CLIENT_ISN + LATER + 2).seq == SVM_ISN
    assert texts_of(aliases) == []


@pytest.mark.parametrize("active", [False, True], ids=["passive", "active"])
def test_the_clients_first_number_is_handed_on(rig: Rig, aliases: Aliases, active: bool) -> None:
    """Or a late copy of its SYN, and data from its first byte on, would look like another connection."""
    c = Connection(rig)
    if active:
        c.svm(0, flags="S", ack=0)
        c.client(0, flags="SA", ack=PVM_ISN + 1)
        rig.control.set_state(1, State.PROMOTED)
    else:
        c = promoted(rig)
    become_primary(rig, aliases)
    texts = texts_of(aliases)
    rig.plane.attach(SPECS[NIC])
    rig.control.set_state(1, State.LOCKSTEP)
    anew(aliases, texts)
    c.client(0, flags="SA" if active else "S", ack=OWN + 1)
    c.client(1, b"first", ack=OWN + 1)
    assert texts_of(aliases) == texts


def test_what_a_connection_has_left_is_replaced(rig: Rig, aliases: Aliases) -> None:
    c = promoted(rig)
    anew(aliases, [text_of(c.port, end="doubt")])
    assert become_primary(rig, aliases) == 1
    run = rig.run("p1_mirror", tcp(c.port, CLIENT_ISN + 1, ack=KNOWN + 1, output=False), "vif1")
    assert checked(run.data).ack == (OWN + 1) & M32


def test_what_has_ended_long_ago_is_not_kept(rig: Rig, aliases: Aliases) -> None:
    c, other = promoted(rig), Connection(rig)
    rig.control.set_state(1, State.LOCKSTEP)
    other.open()
    c.svm(1, flags="RA", ack=CLIENT_ISN + 1)
    rig.control.set_state(1, State.PROMOTED)
    fd = rig.control.fd("flows")
    for index in range(rig.flow_top()):
        flow = rig.flow(index)
        flow.last_ns -= 11 * 10**9  # IDLE_CLOSED
        bpfsys.update(fd, ct.c_uint32(index), flow)
    assert become_primary(rig, aliases) == 1
