"""The secondary's hooks on single segments: what S2 and S1 learn of a connection, and what they change in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether

from coloebpf.model import State
from tests.unit.conftest import SIZES
from tests.unit.rig import DROP, PASS, REDIRECT, XDP_DROP, XDP_PASS, Rig, next_port, tcp, udp

pytestmark = pytest.mark.kernel

M32 = 0xFFFFFFFF
PVM_ISN, SVM_ISN, CLIENT_ISN = 1_000_000, 0xFFFF_FF00, 77_000  # the SVM's numbers wrap soon
PVM_TS, SVM_TS = 500_000, 9_000
WHERE: dict[str, dict[str, Any]] = {
    "v4": {},
    "v6": {"family": 6},
    "tagged": {"tags": (("q", 7),)},
    "v6-two-tags": {"family": 6, "tags": (("ad", 9), ("q", 4094))},
}
PADS: dict[str, list[Any]] = {"aligned": [("NOP", None), ("NOP", None)], "odd": [("NOP", None)], "bare": []}


class Connection:
    """A client's connection to the guest, on the secondary's hooks."""

    def __init__(self, rig: Rig, pad: Sequence[Any] = PADS["aligned"], **where: Any) -> None:
        self.rig, self.port, self.pad, self.where = rig, next_port(), list(pad), where

    def stamp(self, value: int, echo: int) -> list[Any]:
        return [*self.pad, ("Timestamp", (value & M32, echo & M32))]

    def client(self, seq: int, data: bytes = b"", flags: str = "A", **fields: Any) -> TCP | None:
        """What S1 makes of a client's segment; None: it does not reach the SVM."""
        got = self.rig.arrive(
            tcp(self.port, CLIENT_ISN + seq, data, flags, output=False, **fields, **self.where), "fwd1"
        )
        assert got.verdict in (XDP_PASS, XDP_DROP)
        return checked(got.frame) if got.verdict == XDP_PASS else None

    def svm(self, seq: int, data: bytes = b"", flags: str = "A", *, verdict: int = REDIRECT, **fields: Any) -> TCP:
        """What S2 makes of the SVM's segment, `seq` counted from the SVM's ISN."""
        run = self.rig.run("s2_output", tcp(self.port, SVM_ISN + seq, data, flags, **fields, **self.where), "vif1")
        assert run.retval == verdict
        return checked(run.data)

    def open(self, stamped: bool = True) -> None:
        """A passive open: client's SYN, SVM's SYN-ACK, and the client's ACK of the PVM's SYN-ACK."""
        stamps = (self.stamp(1, 0), self.stamp(SVM_TS, 1), self.stamp(2, PVM_TS)) if stamped else ([], [], [])
        assert self.client(0, flags="S", ack=0, options=stamps[0]) is not None
        assert self.svm(0, flags="SA", ack=CLIENT_ISN + 1, options=stamps[1]).seq == SVM_ISN
        ack = self.client(1, ack=PVM_ISN + 1, options=stamps[2])
        assert ack is not None
        assert ack.ack == (SVM_ISN + 1) & M32


def checked(frame: bytes) -> TCP:
    """The TCP header of a frame whose checksums are what scapy computes."""
    packet = Ether(frame)
    again = packet.copy()
    del again[TCP].chksum
    if IP in packet:
        del again[IP].chksum
    made = Ether(bytes(again))
    assert made[TCP].chksum == packet[TCP].chksum, "TCP checksum is wrong"
    assert IP not in packet or made[IP].chksum == packet[IP].chksum
    assert IP in packet or IPv6 in packet
    return packet[TCP]


def options(segment: TCP | None) -> dict[str, Any]:
    assert segment is not None
    return dict(segment.options)


@pytest.fixture(params=list(WHERE.values()), ids=list(WHERE))
def where(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


@pytest.mark.parametrize("pad", PADS.values(), ids=PADS)
def test_numbers_of_a_passive_open_are_translated_both_ways(rig: Rig, where: dict[str, Any], pad: list[Any]) -> None:
    c = Connection(rig, pad, **where)
    c.open()
    out = c.svm(1, b"hello", "PA", ack=CLIENT_ISN + 1, options=c.stamp(SVM_TS + 7, 2))
    assert (out.seq, out.ack, bytes(out.payload)) == (PVM_ISN + 1, CLIENT_ISN + 1, b"hello")
    assert options(out)["Timestamp"] == (PVM_TS + 7, 2)
    into = c.client(1, b"request", ack=PVM_ISN + 6, options=c.stamp(3, PVM_TS + 7))
    assert into is not None
    assert (into.seq, into.ack, bytes(into.payload)) == (CLIENT_ISN + 1, (SVM_ISN + 6) & M32, b"request")
    assert options(into)["Timestamp"] == (3, SVM_TS + 7)


@pytest.mark.parametrize("blocks", [1, 2, 3, 4])
def test_sack_blocks_are_translated(rig: Rig, where: dict[str, Any], blocks: int) -> None:
    c = Connection(rig, **where)
    c.open(stamped=False)
    edges = [100 + 50 * n for n in range(2 * blocks)]
    into = c.client(
        1, ack=PVM_ISN + 50, options=[("NOP", None), ("NOP", None), ("SAck", tuple(PVM_ISN + e for e in edges))]
    )
    assert options(into)["SAck"] == tuple((SVM_ISN + e) & M32 for e in edges)


def test_timestamps_and_sack_blocks_together(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    mixed = [
        *c.stamp(5, PVM_TS + 9),
        ("NOP", None),
        ("SAck", (PVM_ISN + 10, PVM_ISN + 20, PVM_ISN + 300, PVM_ISN + 400)),
    ]
    got = options(c.client(1, ack=PVM_ISN + 2, options=mixed))
    assert got["Timestamp"] == (5, SVM_TS + 9)
    assert got["SAck"] == tuple((SVM_ISN + e) & M32 for e in (10, 20, 300, 400))


def test_an_active_open_learns_the_pvms_number_from_the_servers_answer(rig: Rig, where: dict[str, Any]) -> None:
    c = Connection(rig, **where)
    assert c.svm(0, flags="S", ack=0, options=c.stamp(SVM_TS, 0)).seq == SVM_ISN
    answer = c.client(0, flags="SA", ack=PVM_ISN + 1, options=c.stamp(1, PVM_TS))
    assert answer is not None
    assert (answer.ack, options(answer)["Timestamp"]) == ((SVM_ISN + 1) & M32, (1, SVM_TS))
    out = c.svm(1, b"GET /", ack=CLIENT_ISN + 1, options=c.stamp(SVM_TS + 1, 1))
    assert (out.seq, options(out)["Timestamp"]) == (PVM_ISN + 1, (PVM_TS + 1, 1))


def test_a_clients_ack_before_the_svms_answer_is_kept_back(rig: Rig) -> None:
    c, before = Connection(rig), rig.counters(1)
    c.client(0, flags="S", ack=0)
    assert c.client(1, ack=PVM_ISN + 1) is None
    assert rig.since(before, 1)["dropped.early_ack"] == 1
    assert c.svm(0, flags="SA", ack=CLIENT_ISN + 1).seq == SVM_ISN
    data = c.client(1, b"request", ack=PVM_ISN + 1)
    assert data is not None
    assert data.ack == (SVM_ISN + 1) & M32


def test_reset_and_fin_keep_their_numbers_translated(rig: Rig) -> None:
    for flags in ("FA", "RA"):
        c = Connection(rig)
        c.open()
        assert c.svm(1, flags=flags, ack=CLIENT_ISN + 1).seq == PVM_ISN + 1
        into = c.client(1, flags=flags, ack=PVM_ISN + 1)
        assert into is not None
        assert into.ack == (SVM_ISN + 1) & M32


def test_ports_used_again_start_anew(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    assert c.client(500_000, flags="S", ack=0) is not None
    assert c.svm(9000, flags="SA", ack=CLIENT_ISN + 500_001).seq == (SVM_ISN + 9000) & M32
    ack = c.client(500_001, ack=5)
    assert ack is not None
    assert ack.ack == (SVM_ISN + 9001) & M32
    assert c.svm(9001, b"x", ack=CLIENT_ISN + 500_001).seq == 5


def test_a_checkpoint_makes_every_offset_zero(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    rig.control.clear_translations(1)
    rig.control.settle_translations(1)
    out = c.svm(5, b"x", ack=CLIENT_ISN + 1, options=c.stamp(SVM_TS, 2))
    assert (out.seq, options(out)["Timestamp"]) == ((SVM_ISN + 5) & M32, (SVM_TS, 2))
    into = c.client(1, ack=PVM_ISN + 9, options=c.stamp(2, PVM_TS))
    assert into is not None
    assert (into.ack, options(into)["Timestamp"]) == (PVM_ISN + 9, (2, PVM_TS))


def speaks_for_the_pvm(c: Connection, seq: int, data: bytes = b"x") -> TCP:
    """What S2 makes of a segment of a copy of the PVM; `seq` counted from the PVM's ISN."""
    return c.svm(PVM_ISN - SVM_ISN + seq, data, ack=CLIENT_ISN + 1)


def test_until_the_commit_the_svm_itself_tells_whether_it_is_a_copy(rig: Rig, where: dict[str, Any]) -> None:
    """The primary can die between `prepare` and `committed`, and nobody is left who could say which SVM was promoted."""
    old, new = Connection(rig, **where), Connection(rig, **where)
    for c in (old, new):
        c.open()
        assert c.svm(1, b"answer", ack=CLIENT_ISN + 1).seq == PVM_ISN + 1
    rig.control.clear_translations(1)
    for c in (old, new):
        into = c.client(1, ack=PVM_ISN + 7)
        assert into is not None
        assert into.ack == PVM_ISN + 7, "right for a copy; the old SVM answers it with an ACK of its own"
    rig.control.clear_translations(1)  # the next request, as that one has failed
    assert old.svm(7, b"more", ack=CLIENT_ISN + 1, options=old.stamp(SVM_TS, 2)).seq == PVM_ISN + 7
    assert speaks_for_the_pvm(new, 7).seq == PVM_ISN + 7
    for c, ack in ((old, SVM_ISN + 11), (new, PVM_ISN + 11)):
        into = c.client(1, b"go on", ack=PVM_ISN + 11)
        assert into is not None
        assert into.ack == ack & M32
    assert speaks_for_the_pvm(new, 8).seq == PVM_ISN + 8


def test_a_commit_ends_all_doubt(rig: Rig) -> None:
    c, seen = Connection(rig), Connection(rig)
    c.open()
    rig.control.clear_translations(1)
    rig.control.settle_translations(1)
    rig.control.clear_translations(1)
    assert c.svm(1, b"x", ack=CLIENT_ISN + 1).seq == (SVM_ISN + 1) & M32, "older than the last commit"
    seen.open()
    rig.control.settle_translations(1)
    assert seen.svm(1, b"x", ack=CLIENT_ISN + 1).seq == PVM_ISN + 1, (
        "opened by the new SVM, before the commit was heard of"
    )


def test_what_the_old_svm_opened_in_the_moment_of_a_checkpoint_is_void_for_the_copy(rig: Rig) -> None:
    c, pvm_isn = Connection(rig), PVM_ISN + 2**30  # with numbers near each other nothing is certain, and all stays
    rig.control.clear_translations(1)
    assert c.client(0, flags="S", ack=0) is not None
    assert c.svm(0, flags="SA", ack=CLIENT_ISN + 1).seq == SVM_ISN
    assert c.client(1, ack=pvm_isn + 1) is not None
    rig.control.settle_translations(1)
    wrong = c.client(1, b"request", ack=pvm_isn + 1)
    assert wrong is not None
    assert wrong.ack == (SVM_ISN + 1) & M32, "which the copy answers with an ACK of its own"
    assert c.svm(pvm_isn - SVM_ISN + 1, ack=CLIENT_ISN + 1).seq == pvm_isn + 1
    again = c.client(1, b"request", ack=pvm_isn + 1)
    assert again is not None
    assert again.ack == pvm_isn + 1


def test_a_retransmission_far_back_does_not_put_the_numbers_in_doubt(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    for seq in (1, 10_000_000, 20_000_000, 15_000_000, 21_000_000):
        assert c.svm(seq, b"x" * 100, ack=CLIENT_ISN + 1).seq == PVM_ISN + seq
    reset = c.svm(0 - SVM_ISN, flags="RA", ack=CLIENT_ISN + 1)  # a reset of what never was has number 0
    assert reset.seq == 0
    assert c.svm(21_000_100, b"x", ack=CLIENT_ISN + 1).seq == PVM_ISN + 21_000_100


def test_a_connection_from_before_the_checkpoint_keeps_its_numbers(rig: Rig) -> None:
    c = Connection(rig)
    assert c.svm(5, b"x", ack=CLIENT_ISN + 1).seq == (SVM_ISN + 5) & M32
    into = c.client(1, ack=PVM_ISN + 9)
    assert into is not None
    assert into.ack == PVM_ISN + 9


def test_a_promotion_keeps_the_offsets_and_the_bridge_takes_over(rig: Rig, where: dict[str, Any]) -> None:
    c = Connection(rig, **where)
    c.open()
    segment = tcp(
        c.port, CLIENT_ISN + 1, b"request", ack=PVM_ISN + 1, output=False, options=c.stamp(3, PVM_TS), **where
    )
    before = rig.counters(1)
    assert rig.run("s3_isolate", segment, "vif1").retval == DROP, "the SVM hears only S1 until it is promoted"
    assert rig.since(before, 1) == {"dropped.isolated": 1}
    rig.control.set_state(1, State.PROMOTED)
    run = rig.run("s3_isolate", segment, "vif1")
    into = checked(run.data)
    assert (run.retval, into.ack, options(into)["Timestamp"]) == (PASS, (SVM_ISN + 1) & M32, (3, SVM_TS))
    assert c.svm(1, b"answer", verdict=PASS, ack=CLIENT_ISN + 8).seq == PVM_ISN + 1
    assert c.client(1, ack=PVM_ISN + 1) is None, "the primary is gone: fwd has nothing to say"


def test_s3_lets_pass_what_s1_delivers(rig: Rig) -> None:
    frame = udp(next_port(), b"x", output=False)
    assert rig.run("s3_isolate", frame, "vif1", mark=rig.mark).retval == PASS
    assert rig.run("s3_isolate", frame, "vif1", mark=rig.mark ^ 1 << 31).retval == DROP


S2_BY_STATE = [
    (State.UNPROTECTED, DROP, "dropped.isolated"),
    (State.SYNCING, REDIRECT, "svm_output"),
    (State.LOCKSTEP, REDIRECT, "svm_output"),
    (State.CHECKPOINTING, REDIRECT, "svm_output"),
    (State.PASSTHROUGH, DROP, "dropped.isolated"),
    (State.PROMOTED, PASS, "svm_output"),
    (State.HALTED, DROP, "dropped.halted"),
]


@pytest.mark.parametrize(
    ("state", "verdict", "counter"), S2_BY_STATE, ids=lambda x: x.name if isinstance(x, State) else ""
)
def test_svm_output_on_its_own_host_by_state(rig: Rig, state: State, verdict: int, counter: str) -> None:
    rig.control.set_state(1, state)
    before, frame = rig.counters(1), udp(next_port(), b"x")
    run = rig.run("s2_output", frame, "vif1")
    assert (run.retval, run.data) == (verdict, frame)
    assert rig.since(before, 1) == {counter: 1}


S1_BY_STATE = [(state, state in (State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING)) for state in State]


@pytest.mark.parametrize(("state", "delivered"), S1_BY_STATE, ids=lambda x: x.name if isinstance(x, State) else "")
def test_client_frames_on_the_secondary_by_state(rig: Rig, state: State, delivered: bool) -> None:
    rig.control.set_state(1, state)
    before = rig.counters(1)
    assert rig.arrive(udp(next_port(), b"x", output=False), "fwd1").verdict == (XDP_PASS if delivered else XDP_DROP)
    assert rig.since(before, 1) == ({"delivered": 1} if delivered else {"dropped.state": 1})


def test_a_full_table_refuses_new_connections_and_forgets_none(rig: Rig) -> None:
    c = Connection(rig)
    c.open()
    for port in range(SIZES.flows):
        rig.arrive(tcp(1 + port, 1, flags="S", ack=0, output=False), "fwd1")
    assert c.svm(1, b"x", ack=CLIENT_ISN + 1).seq == PVM_ISN + 1, "the live connection was forgotten"
    late = Connection(rig)
    before = rig.counters(1)
    assert late.client(0, flags="S", ack=0) is not None
    assert rig.since(before, 1)["dropped.no_flow"] == 1
    assert late.svm(0, flags="SA", ack=CLIENT_ISN + 1).seq == SVM_ISN
    ack = late.client(1, ack=PVM_ISN + 1)
    assert ack is not None
    assert ack.ack == PVM_ISN + 1, "without a place its numbers stay: the flow diverges, and a checkpoint mends it"
