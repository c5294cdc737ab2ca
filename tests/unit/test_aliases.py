"""Connections that the client knows by other numbers than the guest: P1 and P2, and S2 and S3 of a promoted one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
from scapy.layers.inet import TCP

from coloebpf import bpfsys
from coloebpf.aliases import ENDS, FORM, IDLE_ALIAS_NS, TEXT_LENGTH, Aliases
from coloebpf.model import Role, State
from tests.unit.conftest import SPECS
from tests.unit.rig import DROP, PASS, Rig, tcp
from tests.unit.test_translate import (
    CLIENT_ISN,
    M32,
    PVM_ISN,
    PVM_TS,
    SVM_ISN,
    SVM_TS,
    WHERE,
    Connection,
    checked,
    options,
)

pytestmark = pytest.mark.kernel

# What the client knows: the numbers of the PVM that it connected to. The guest's are those of an SVM of that time.
KNOWN, OWN, KNOWN_TS, OWN_TS = PVM_ISN, SVM_ISN, PVM_TS, SVM_TS
NIC = 1  # the secondary's; it becomes a primary's in these tests


@pytest.fixture
def aliases(rig: Rig) -> Iterator[Aliases]:
    """Of the NIC that changes its role; nothing is left behind."""
    found = Aliases(rig.control, 1, (NIC,))
    yield found
    rig.control.suspend(1)
    rig.control.commit(1)
    anew(found, ())
    rig.plane.attach(SPECS[NIC])


@pytest.fixture(params=list(WHERE.values()), ids=list(WHERE))
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def texts_of(aliases: Aliases) -> list[str]:
    return [text for some in aliases.texts() for text in some]


def anew(aliases: Aliases, texts: Sequence[str]) -> None:
    """These are all there are."""
    for _ in aliases.clear():
        pass
    aliases.take(texts)


def left(aliases: Aliases) -> int:
    """How many are when those that have ended are gone."""
    for _ in aliases.end_idle():
        pass
    return len(texts_of(aliases))


def become_primary(rig: Rig, aliases: Aliases, state: State = State.PASSTHROUGH) -> int:
    """What the service of a promoted secondary does that is started as a primary's. Returns how many are kept."""
    kept = aliases.keep()
    rig.control.set_state(1, state)
    rig.plane.attach(replace(SPECS[NIC], role=Role.PRIMARY))
    return kept


def promoted(rig: Rig, stamped: bool = True, **where: Any) -> Connection:
    """A connection that was opened in lock-step, on the host that has taken over since."""
    c = Connection(rig, **where)
    c.open(stamped)
    rig.control.set_state(1, State.PROMOTED)
    return c


def sends(c: Connection, seq: int, data: bytes = b"", flags: str = "A", **fields: Any) -> TCP:
    """The guest, `seq` counted from its own ISN; what the client gets of it by P2."""
    run = c.rig.run("p2_output", tcp(c.port, OWN + seq, data, flags, **fields, **c.where), "vif1")
    assert run.retval == PASS
    return checked(run.data)


def hears(c: Connection, data: bytes = b"", flags: str = "A", seq: int = 1, **fields: Any) -> TCP:
    """What P1 makes of a client's segment."""
    frame = tcp(c.port, CLIENT_ISN + seq, data, flags, output=False, **fields, **c.where)
    run = c.rig.run("p1_mirror", frame, "vif1")
    assert run.retval == PASS
    return checked(run.data)


def blocks(isn: int, edges: Sequence[int]) -> tuple[str, tuple[int, ...]]:
    return "SAck", tuple((isn + edge) & M32 for edge in edges)


def text_of(port: int, nic: int = 0, end: str = "") -> str:
    """An entry as the link has it; the ports are a test's own."""
    address = bytes(10) + b"\xff\xff"
    ends = address + bytes((10, 77, 0, 10)), address + bytes((10, 77, 0, 1))
    flags = 1 << ENDS.index(end) if end else 0
    deltas = (KNOWN - OWN) & M32, (KNOWN_TS - OWN_TS) & M32
    return FORM.pack(nic, port, 40_000, 0, 0, *ends, *deltas, OWN, OWN, CLIENT_ISN, flags).hex()


@pytest.mark.parametrize("state", [State.PASSTHROUGH, State.UNPROTECTED, State.SYNCING], ids=lambda s: s.name)
def test_a_promoted_guest_keeps_its_connections_as_a_primary(
    rig: Rig, aliases: Aliases, where: dict[str, Any], state: State
) -> None:
    c = promoted(rig, **where)
    assert become_primary(rig, aliases, state) == 1
    out = sends(c, 1, b"answer", "PA", ack=CLIENT_ISN + 1, options=c.stamp(OWN_TS + 7, 2))
    assert (out.seq, out.ack, bytes(out.payload)) == (KNOWN + 1, CLIENT_ISN + 1, b"answer")
    assert options(out)["Timestamp"] == (KNOWN_TS + 7, 2)
    into = hears(c, b"request", ack=KNOWN + 7, options=c.stamp(3, KNOWN_TS + 7))
    assert (into.seq, into.ack, bytes(into.payload)) == (CLIENT_ISN + 1, (OWN + 7) & M32, b"request")
    assert options(into)["Timestamp"] == (3, OWN_TS + 7)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_sack_blocks_of_the_client_become_the_guests(
    rig: Rig, aliases: Aliases, where: dict[str, Any], count: int
) -> None:
    c, edges = promoted(rig, stamped=False, **where), [100 + 50 * n for n in range(2 * count)]
    become_primary(rig, aliases)
    soft = [("NOP", None), ("NOP", None)]
    into = hears(c, ack=KNOWN + 50, options=[*soft, blocks(KNOWN, edges)])
    assert options(into)["SAck"] == blocks(OWN, edges)[1]


def test_others_connections_keep_their_numbers(rig: Rig, aliases: Aliases) -> None:
    c, other = promoted(rig), Connection(rig)
    become_primary(rig, aliases)
    assert sends(other, 1, b"x", ack=CLIENT_ISN + 1).seq == (OWN + 1) & M32
    assert hears(other, ack=KNOWN + 1).ack == KNOWN + 1
    assert sends(c, 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1


def test_what_a_checkpoint_has_made_equal_is_not_kept(rig: Rig, aliases: Aliases) -> None:
    old = Connection(rig)
    old.open()
    rig.control.clear_translations(1)
    rig.control.settle_translations(1)
    young = promoted(rig)
    assert become_primary(rig, aliases) == 1
    assert sends(old, 1, b"x", ack=CLIENT_ISN + 1).seq == (OWN + 1) & M32
    assert sends(young, 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1


def test_nobody_looks_where_nothing_is_kept(rig: Rig, aliases: Aliases) -> None:
    """The pair's own word says so: the map is not asked for each packet."""
    c = promoted(rig)
    become_primary(rig, aliases)
    rig.control.set_aliased(1, False)
    assert sends(c, 1, b"x", ack=CLIENT_ISN + 1).seq == (OWN + 1) & M32
    rig.control.set_aliased(1, True)
    rig.control.settle_translations(1)
    assert sends(c, 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1, "the other half of that word is another's"
    assert aliases.keep() == 1


def test_in_doubt_the_guests_first_segment_tells(rig: Rig, aliases: Aliases) -> None:
    """The old primary died in the middle of a checkpoint, and the guest has said nothing since."""
    own, copy = Connection(rig), Connection(rig)
    for c in (own, copy):
        c.open()
    rig.control.clear_translations(1)
    rig.control.set_state(1, State.PROMOTED)
    assert become_primary(rig, aliases) == 2
    assert hears(own, ack=KNOWN + 1).ack == KNOWN + 1
    assert sends(own, 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1
    assert hears(own, ack=KNOWN + 2).ack == (OWN + 2) & M32
    assert sends(copy, KNOWN - OWN + 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1
    assert hears(copy, ack=KNOWN + 2).ack == KNOWN + 2
    assert sends(copy, KNOWN - OWN + 2, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 2


def test_the_next_secondary_needs_them_when_it_is_promoted_and_not_before(
    rig: Rig, aliases: Aliases, where: dict[str, Any]
) -> None:
    c = promoted(rig, **where)
    become_primary(rig, aliases)
    texts = texts_of(aliases)
    anew(aliases, ())
    rig.reset()  # no flow is left: the next secondary has none
    rig.plane.attach(SPECS[NIC])
    anew(aliases, texts)
    assert c.svm(5, b"x", ack=CLIENT_ISN + 1).seq == (OWN + 5) & M32, "the primary compares the guest's numbers"
    into = c.client(1, b"q", ack=OWN + 6)
    assert into is not None
    assert into.ack == (OWN + 6) & M32
    rig.control.set_state(1, State.PROMOTED)
    out = c.svm(5, b"x", verdict=PASS, ack=CLIENT_ISN + 1, options=c.stamp(OWN_TS + 9, 1))
    assert (out.seq, options(out)["Timestamp"]) == (KNOWN + 5, (KNOWN_TS + 9, 1))
    segment = tcp(c.port, CLIENT_ISN + 1, b"q", ack=KNOWN + 6, output=False, options=c.stamp(2, KNOWN_TS + 9), **where)
    run = rig.run("s3_isolate", segment, "vif1")
    into = checked(run.data)
    assert (run.retval, into.ack, options(into)["Timestamp"]) == (PASS, (OWN + 6) & M32, (2, OWN_TS + 9))
    assert become_primary(rig, aliases) == 1
    assert sends(c, 6, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 6


def test_each_change_of_roles_adds_its_young_connections(rig: Rig, aliases: Aliases) -> None:
    c = promoted(rig)
    become_primary(rig, aliases)
    rig.plane.attach(SPECS[NIC])
    rig.control.set_state(1, State.LOCKSTEP)
    rig.control.clear_translations(1)  # a checkpoint: both VMs have the guest's numbers
    rig.control.settle_translations(1)
    younger = promoted(rig)
    assert become_primary(rig, aliases) == 2
    for one in (c, younger):
        assert sends(one, 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1
        assert hears(one, ack=KNOWN + 2).ack == (OWN + 2) & M32


def test_the_same_ports_again_begin_with_the_guests_numbers(rig: Rig, aliases: Aliases) -> None:
    c = promoted(rig)
    become_primary(rig, aliases)
    assert sends(c, 0, flags="SA", ack=CLIENT_ISN + 1).seq == KNOWN, "it says its SYN again"
    assert hears(c, flags="S", seq=900_000, ack=0).seq == CLIENT_ISN + 900_000
    assert sends(c, 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1, "a SYN alone ends nothing"
    assert sends(c, 5_000_000, flags="SA", ack=CLIENT_ISN + 900_001).seq == (OWN + 5_000_000) & M32
    assert hears(c, seq=900_001, ack=OWN + 5_000_001).ack == (OWN + 5_000_001) & M32
    assert texts_of(aliases) == []


def test_the_same_ports_again_on_the_next_secondary(rig: Rig, aliases: Aliases) -> None:
    c = Connection(rig)
    anew(aliases, [text_of(c.port)])
    assert c.svm(9, flags="S", ack=0).seq == OWN + 9
    assert texts_of(aliases) == []


@pytest.mark.parametrize(
    "how", ["closed", "reset by the guest", "open", "half closed", "reset by the client", "reset and said on"]
)
def test_an_entry_goes_when_its_connection_has_ended(rig: Rig, aliases: Aliases, how: str) -> None:
    """A client's reset may be forged or late, and the guest ignores it then: its word alone ends nothing."""
    c = promoted(rig)
    become_primary(rig, aliases)
    if how in ("closed", "half closed"):
        sends(c, 1, flags="FA", ack=CLIENT_ISN + 1)
    if how == "closed":
        hears(c, flags="FA", ack=KNOWN + 2)
    if how == "reset by the client":
        hears(c, flags="R", ack=0)
    if how in ("reset by the guest", "reset and said on"):
        assert sends(c, 1, flags="RA", ack=CLIENT_ISN + 1).seq == KNOWN + 1
    if how == "reset and said on":
        sends(c, 1, ack=CLIENT_ISN + 1)
    assert left(aliases) == 1, "a late segment may still come"
    age(rig)
    assert left(aliases) == (0 if how in ("closed", "reset by the guest") else 1)


def age(rig: Rig) -> None:
    """Dates the last packet of every entry back."""
    fd = rig.control.fd("aliases")
    for key in bpfsys.keys(fd, rig.control.shapes.key("aliases")):
        alias = rig.control.shapes.leaf("aliases")()
        bpfsys.lookup(fd, key, alias)
        alias.last_ns -= IDLE_ALIAS_NS
        bpfsys.update(fd, key, alias)


@pytest.mark.parametrize("flags", ["FA", "RA"])
def test_a_replica_ends_nothing(rig: Rig, aliases: Aliases, flags: str) -> None:
    """It may have diverged; promoted it is the guest."""
    c = Connection(rig)
    anew(aliases, [text_of(c.port)])
    assert c.svm(1, flags=flags, ack=CLIENT_ISN + 1).seq == (OWN + 1) & M32
    assert c.client(1, flags="FA", ack=OWN + 2) is not None
    age(rig)
    assert left(aliases) == 1
    rig.control.set_state(1, State.PROMOTED)
    assert c.svm(1, flags=flags, verdict=PASS, ack=CLIENT_ISN + 2).seq == KNOWN + 1
    age(rig)
    assert left(aliases) == 0


def test_what_speaks_while_a_protection_begins_ends_nothing(rig: Rig, aliases: Aliases) -> None:
    """The SVM of an earlier protection, say: its connections are its own."""
    c = Connection(rig)
    anew(aliases, [text_of(c.port)])
    rig.control.set_state(1, State.SYNCING)
    assert c.svm(9, flags="S", ack=0).seq == OWN + 9
    assert texts_of(aliases) == [text_of(c.port)]


def test_a_replica_settles_whose_numbers_it_has(rig: Rig, aliases: Aliases) -> None:
    """In doubt the guest's first segment tells, and its replica has the same numbers: later ones are far from these."""
    c = Connection(rig)
    anew(aliases, [text_of(c.port, end="doubt")])
    assert c.svm(KNOWN - OWN + 1, b"x", ack=CLIENT_ISN + 1).seq == KNOWN + 1
    rig.control.set_state(1, State.PROMOTED)
    far = KNOWN + 2**30
    assert c.svm(far - OWN, b"x", verdict=PASS, ack=CLIENT_ISN + 1).seq == far


def test_texts_bring_all_there_is_to_know(rig: Rig, aliases: Aliases, where: dict[str, Any]) -> None:
    c = promoted(rig, **where)
    become_primary(rig, aliases)
    sends(c, 1, flags="FA", ack=CLIENT_ISN + 1)
    texts = texts_of(aliases)
    assert [len(text) for text in texts] == [TEXT_LENGTH]
    anew(aliases, [text_of(99)])
    anew(aliases, texts)
    assert texts_of(aliases) == texts
    assert hears(c, ack=KNOWN + 2).ack == (OWN + 2) & M32
    others = Aliases(rig.control, 0, (0,))
    assert texts_of(others) == []
    anew(others, ())
    assert texts_of(aliases) == texts


@pytest.mark.parametrize("text", ["", "00", "zz" * FORM.size, text_of(80)[2:], text_of(80, nic=1)])
def test_what_is_no_alias_is_refused(rig: Rig, aliases: Aliases, text: str) -> None:
    with pytest.raises(ValueError, match=r"is no alias|has no NIC 2|hexadecimal"):
        aliases.take([text])


def test_comparing_is_in_the_guests_numbers(rig: Rig, aliases: Aliases) -> None:
    c = promoted(rig)
    become_primary(rig, aliases, State.LOCKSTEP)
    segment = tcp(c.port, OWN + 1, b"answer", ack=CLIENT_ISN + 1)
    assert rig.run("p2_output", segment, "vif1").retval == DROP
    assert rig.counters(1)["held_packets"] > 0
    flow = next(flow for flow in rig.flows() if flow.p_count)
    assert flow.p_high == (OWN + 7) & M32
    assert rig.arrive(segment, "fwd1").start == (OWN + 1) & M32
