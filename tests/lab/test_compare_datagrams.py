"""What is not TCP: one row per case of design.md section 4, both orders of arrival, IPv4 and IPv6, tagged and not."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.lab.datagram_rows import DATA, EQUAL, UNEQUAL, Row, big, echo, fragments, pairs
from tests.lab.heard import ones_sum, same_frames
from tests.lab.talk import KINDS, Talk
from tests.lab.wire import Wire

pytestmark = pytest.mark.lab


@pytest.fixture(autouse=True)
def _clean(wire: Wire) -> Iterator[None]:
    yield
    wire.clean()


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize(("row", "kind"), pairs(EQUAL))
def test_equal_output_is_released_as_the_pvm_sent_it(wire: Wire, row: Row, kind: str, first: str) -> None:
    talk = Talk(wire, **KINDS[kind])
    pvm, svm, before = row.pvm(talk), row.svm(talk), wire.nic()
    sides = {"pvm": pvm, "svm": svm}
    wire.send(first, sides[first])
    assert wire.seen() == []
    wire.send("svm" if first == "pvm" else "pvm", sides["svm" if first == "pvm" else "pvm"])
    got = wire.released(len(pvm))
    assert [f.hex() for f in got] == [f.hex() for f in pvm]
    change = wire.nic().since(before)
    assert {name: n for name, n in change.items() if name.startswith(("divergences", "dropped"))} == {}
    assert (change["held"], change["parked"], change["compared_packets"]) == (0, 0, len(pvm))


@pytest.mark.parametrize("first", ["pvm", "svm"])
@pytest.mark.parametrize(("row", "kind"), pairs(UNEQUAL))
def test_unequal_output_waits_for_a_checkpoint(wire: Wire, row: Row, kind: str, first: str) -> None:
    talk = Talk(wire, **KINDS[kind])
    pvm, svm, before = row.pvm(talk), row.svm(talk), wire.nic()
    for node in (first, "svm" if first == "pvm" else "pvm"):
        wire.send(node, pvm if node == "pvm" else svm)
    assert wire.seen() == []
    assert wire.nic().since(before)["held"] == len(pvm)
    wire.expire()
    change = wire.nic().since(before)
    found = {name.partition(".")[2] for name in change if name.startswith("divergences")}
    assert found & {"datagram", "missing_on_svm"}
    assert wire.seen() == []
    wire.checkpoint()
    got = wire.released(len(pvm))
    assert [f.hex() for f in got] == [f.hex() for f in pvm]
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_multiset_counts(wire: Wire, kind: str) -> None:
    """The SVM's one datagram proves one of the PVM's two."""
    talk = Talk(wire, **KINDS[kind])
    wire.pvm(talk.udp(b"same"), talk.udp(b"same"))
    wire.svm(talk.udp(b"same"))
    same_frames(wire.released(1), [talk.udp(b"same")])
    wire.pvm(talk.udp(b"other"))
    wire.svm(talk.udp(b"other"))
    assert wire.seen() == []  # in the PVM's order
    wire.svm(talk.udp(b"same"))
    same_frames(wire.released(2), [talk.udp(b"same"), talk.udp(b"other")])


def test_ports_and_addresses_set_flows_apart(wire: Wire) -> None:
    a, b = Talk(wire), Talk(wire)
    wire.pvm(a.udp(b"same"))
    wire.svm(b.udp(b"same"))
    wire.svm(Talk(wire, family=6, guest_port=a.guest_port).udp(b"same"))
    wire.svm(Talk(wire, tags=[("q", 3)], guest_port=a.guest_port).udp(b"same"))
    wire.svm(Talk(wire, guest_port=a.guest_port, client_port=4).udp(b"same"))
    assert wire.seen() == []
    wire.checkpoint()
    same_frames(wire.released(1), [a.udp(b"same")])


def test_a_vlan_and_a_service_vlan_are_not_the_same(wire: Wire) -> None:
    inner, outer = Talk(wire, tags=[("q", 3)]), Talk(wire, tags=[("ad", 3)])
    outer.guest_port = inner.guest_port
    wire.pvm(inner.udp(b"same"))
    wire.svm(outer.udp(b"same"))
    assert wire.seen() == []
    wire.checkpoint()
    same_frames(wire.released(1), [inner.udp(b"same")])


def test_half_a_datagram_proves_nothing(wire: Wire) -> None:
    talk = Talk(wire)
    pvm = fragments(talk, big(talk, DATA[:3000]), 1400, 2800)
    svm = fragments(talk, big(talk, DATA[:3000]), 1000, 2000, number=7)
    wire.pvm(*pvm)
    wire.svm(*svm[:2])
    assert wire.seen() == []
    wire.svm(svm[2])
    assert [f.hex() for f in wire.released(3)] == [f.hex() for f in pvm]


def test_half_a_datagram_of_the_pvms_stays(wire: Wire) -> None:
    talk = Talk(wire)
    pvm = fragments(talk, big(talk, DATA[:3000]), 1400, 2800)
    wire.svm(*fragments(talk, big(talk, DATA[:3000]), 1000, 2000, number=7))
    wire.pvm(*pvm[:2])
    assert wire.seen() == []
    wire.pvm(pvm[2])
    assert [f.hex() for f in wire.released(3)] == [f.hex() for f in pvm]


@settings(max_examples=60, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32), count=st.integers(1, 12), fragmented=st.booleans(), family=st.sampled_from([4, 6]))
def test_any_order_of_the_svms_datagrams(wire: Wire, seed: int, count: int, fragmented: bool, family: int) -> None:
    """Datagrams of the SVM's in any order, cut anywhere, interleaved anyhow: all leave, in the PVM's order."""
    luck, talk = random.Random(seed), Talk(wire, family=family)
    bodies = [bytes(luck.choices(b"ab", k=luck.choice([1, 1, 2, 40, 1600]))) for _ in range(count)]

    def frames(body: bytes, number: int) -> list[bytes]:
        if not fragmented or len(body) < 1600:
            return [talk.udp(body[:1400], ip={"id": number})]
        found = fragments(
            talk, big(talk, body), *sorted({luck.randrange(25, 170) * 8, luck.randrange(170, 190) * 8}), number=number
        )
        luck.shuffle(found)
        return found

    pvm = [frame for number, body in enumerate(bodies) for frame in frames(body, number + 1)]
    order = luck.sample(range(count), count)
    svm = [frame for number in order for frame in frames(bodies[number], 100 + number)]
    sides = {"pvm": iter(pvm), "svm": iter(svm)}
    turns = ["pvm"] * len(pvm) + ["svm"] * len(svm)
    luck.shuffle(turns)
    before = wire.nic()
    for node in turns:
        wire.push(node, next(sides[node]))
    wire.settle()
    got = wire.seen()
    whole = [f.hex() for f in pvm]
    if fragmented:  # they are another flow than the datagrams beside them
        assert sorted(f.hex() for f in got) == sorted(whole)
    else:
        assert [f.hex() for f in got] == whole
    change = wire.nic().since(before)
    assert (change["held"], change["parked"]) == (0, 0)


def test_icmp_checksums_are_not_compared(wire: Wire) -> None:
    talk = Talk(wire)
    right = echo(talk, b"abcd")
    wrong = bytearray(right)
    wrong[14 + 20 + 2] ^= 0xFF
    wire.pvm(right)
    wire.svm(bytes(wrong))
    got = wire.released(1)
    assert [f.hex() for f in got] == [right.hex()]
    assert ones_sum(got[0][34:]) == 0xFFFF
