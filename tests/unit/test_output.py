"""P2 on single frames: what passes, is held or refused, by state; exemptions, full tables, sweep and flush."""

from __future__ import annotations

import ctypes as ct
import random
import socket
import struct
import time
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6ND_NS
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from coloebpf import bpfsys
from coloebpf.errors import ConfigError
from coloebpf.model import Policy, State
from tests.fence import pass_all_cpus
from tests.unit.conftest import SIZES
from tests.unit.rig import (
    CLIENT_4,
    CLIENT_MAC,
    DROP,
    GUEST_4,
    GUEST_MAC,
    NEVER_NS,
    OTHER_MAC,
    PASS,
    SKB_CB,
    SKB_GSO_SIZE,
    SKB_IFINDEX,
    XDP_DROP,
    XDP_PASS,
    Rig,
    frame_of,
    next_port,
    tcp,
    udp,
)

pytestmark = pytest.mark.kernel

HELD = {"held_packets": 1}
ETH_P_ALL, SO_RCVBUFFORCE = 3, 33
RECEIVE_BYTES = 8 << 20  # a flush sends all slots at once
ARP_FRAME = bytes(Ether(src=GUEST_MAC, dst=CLIENT_MAC) / ARP(psrc=GUEST_4, pdst=CLIENT_4))
ND_FRAME = bytes(frame_of(family=6, layer=ICMPv6ND_NS(tgt="fd77::1")))
OTHER_FRAME = bytes(Ether(src=GUEST_MAC, dst=CLIENT_MAC, type=0x88B5) / Raw(b"neither IP nor ARP"))

P2_BY_STATE = [
    (State.UNPROTECTED, PASS, {"unprotected": 1}),
    (State.SYNCING, PASS, {"unprotected": 1}),
    (State.LOCKSTEP, DROP, HELD),
    (State.CHECKPOINTING, DROP, HELD),
    (State.PASSTHROUGH, PASS, {"unprotected": 1}),
    (State.PROMOTED, DROP, {"dropped.halted": 1}),
    (State.HALTED, DROP, {"dropped.halted": 1}),
]


@pytest.mark.parametrize(
    ("state", "verdict", "counted"), P2_BY_STATE, ids=lambda x: x.name if isinstance(x, State) else ""
)
def test_pvm_output_by_state(rig: Rig, state: State, verdict: int, counted: dict[str, int]) -> None:
    rig.control.set_state(0, state)
    before = rig.counters()
    assert rig.output(udp(next_port(), b"x")) == verdict
    assert rig.since(before) == counted


SVM_BY_STATE = [
    (State.LOCKSTEP, XDP_PASS, {}),
    (State.CHECKPOINTING, XDP_DROP, {"dropped.old_epoch": 1}),
    *(
        (state, XDP_DROP, {"dropped.state": 1})
        for state in (State.UNPROTECTED, State.PASSTHROUGH, State.PROMOTED, State.HALTED)
    ),
]


@pytest.mark.parametrize(
    ("state", "verdict", "counted"), SVM_BY_STATE, ids=lambda x: x.name if isinstance(x, State) else ""
)
def test_svm_output_by_state(rig: Rig, state: State, verdict: int, counted: dict[str, int]) -> None:
    rig.control.set_state(0, state)
    before = rig.counters()
    assert rig.arrive(udp(next_port(), b"x")).verdict == verdict
    assert rig.since(before) == counted


MIRROR_BY_STATE = [(state, state in (State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING)) for state in State]


@pytest.mark.parametrize(("state", "mirrors"), MIRROR_BY_STATE, ids=lambda x: x.name if isinstance(x, State) else "")
def test_client_frames_are_mirrored_while_there_is_an_svm(rig: Rig, state: State, mirrors: bool) -> None:
    rig.control.set_state(0, state)
    before, frame = rig.counters(), udp(next_port(), b"x", output=False)
    run = rig.run("p1_mirror", frame, "vif0")
    assert (run.retval, run.data) == (PASS, frame)
    assert rig.since(before) == ({"mirrored_packets": 1, "mirrored_bytes": len(frame)} if mirrors else {})


def test_a_right_to_speak_that_ran_out_halts_without_anybodys_help(rig: Rig) -> None:
    rig.control.set_deadline(0, time.monotonic_ns() - 1)
    before = rig.counters()
    assert rig.output(udp(next_port(), b"x")) == DROP
    assert rig.since(before) == {"dropped.halted": 1}
    rig.control.set_deadline(0, time.monotonic_ns() + 60 * 10**9)
    before = rig.counters()
    rig.output(udp(next_port(), b"x"))
    assert rig.since(before) == HELD


POLICIES: list[tuple[str, bytes, Policy, int, dict[str, int]]] = [
    (f"{name}-{policy.name}", frame, policy, verdict, counted)
    for name, frame in (("arp", ARP_FRAME), ("nd", ND_FRAME), ("other", OTHER_FRAME))
    for policy, verdict, counted in (
        (Policy.PASS, PASS, {"policy_passed": 1}),
        (Policy.COMPARE, DROP, HELD),
        (Policy.DROP, DROP, {"dropped.policy": 1}),
    )
]


@pytest.mark.parametrize(
    ("frame", "policy", "verdict", "counted"), [row[1:] for row in POLICIES], ids=[row[0] for row in POLICIES]
)
def test_policies(rig: Rig, frame: bytes, policy: Policy, verdict: int, counted: dict[str, int]) -> None:
    rig.set_policy(policy, policy, policy)
    before = rig.counters()
    assert rig.output(frame) == verdict
    assert rig.since(before) == counted


REFUSED: dict[str, tuple[bytes, str]] = {
    "foreign-mac": (udp(7, b"x", macs=(OTHER_MAC, CLIENT_MAC)), "foreign_mac"),
    "longer-than-a-slot": (OTHER_FRAME + bytes(2100), "too_long"),
}


@pytest.mark.parametrize(("frame", "why"), REFUSED.values(), ids=REFUSED)
def test_what_p2_refuses_is_counted_and_takes_no_slot(rig: Rig, frame: bytes, why: str) -> None:
    before = rig.counters()
    assert rig.output(frame) == DROP
    assert rig.since(before) == {f"dropped.{why}": 1}
    assert rig.slots_used() == 0


def test_a_device_that_nobody_registered_is_left_alone(rig: Rig) -> None:
    for program in ("p1_mirror", "p2_output", "s2_output", "s3_isolate"):
        assert rig.run(program, udp(7, b"x"), "fwd0").retval == PASS


def test_a_frame_from_an_unknown_link_is_dropped_and_counted(rig: Rig) -> None:
    socket.if_nametoindex("vif0")
    before = rig.control.snapshot()["unknown_link"]
    rig.ifindex["nobody"] = 0
    assert rig.arrive(udp(7, b"x"), "nobody").verdict == XDP_DROP
    assert rig.control.snapshot()["unknown_link"] == before + 1


# ---- comparing -------------------------------------------------------------------------------------------------------


def test_output_that_the_svm_has_proven_already_passes_untouched(rig: Rig) -> None:
    frame = udp(next_port(), b"both say this")
    prove(rig, frame)
    before = rig.counters()
    run = rig.run("p2_output", frame, "vif0")
    assert (run.retval, run.data) == (PASS, frame)
    after = rig.since(before)
    assert (after["released_unchanged"], after["compared_packets"], after["svm_unparked"]) == (1, 1, 1)


def test_held_output_leaves_as_it_came_with_the_next_checkpoint(rig: Rig) -> None:
    ports = [next_port() for _ in range(3)]
    frames = [udp(port, bytes([n]) * 50) for n in range(4) for port in ports]
    with reentering() as seen:
        for frame in frames:
            assert rig.output(frame) == DROP
        rig.control.suspend(0)
        late = udp(ports[0], b"of the new epoch")
        assert rig.output(late) == DROP
        assert rig.control.commit(0) == len(frames)
        got = drain(seen)
    for port in ports:  # flows don't wait for one another
        assert [f for f in got if Ether(f)[UDP].sport == port] == [f for f in frames if Ether(f)[UDP].sport == port]
    assert late not in got
    assert sum(flow.p_count for flow in rig.flows()) == 1


@pytest.mark.parametrize("length", [0, 1, 19, 488, 489, 490, 491, 492, 493, 1002, 1003, 1439, 1440])
@pytest.mark.parametrize("family", [4, 6])
def test_a_held_checksum_that_was_left_to_the_device_is_filled_in(rig: Rig, family: int, length: int) -> None:
    """The kernel's helper sums up 512 bytes at a time."""
    whole = tcp(next_port(), 5, random.Random(length).randbytes(length), "FA", family=family)
    partial = bytearray(whole)
    at = 14 + (20 if family == 4 else 40) + 16
    partial[at : at + 2] = pseudo_header_sum(whole, family).to_bytes(2, "big")
    with reentering() as seen:
        rig.output(bytes(partial))
        rig.control.suspend(0)
        assert rig.control.commit(0) == 1
        assert drain(seen) == [whole]


def test_passthrough_lets_go_of_everything(rig: Rig) -> None:
    port = next_port()
    rig.output(udp(port, b"held"))
    rig.control.set_state(0, State.PASSTHROUGH)
    with reentering() as seen:
        assert rig.control.kick() == 1
        assert drain(seen) == [udp(port, b"held")]
    assert rig.output(udp(next_port(), b"free")) == PASS


def test_a_super_packet_is_held_in_wire_sized_pieces(rig: Rig) -> None:
    port, data = next_port(), bytes(range(256)) * 10
    with reentering() as seen:
        before = rig.counters()
        assert rig.output(tcp(port, 1000, data, "PA"), gso_size=1000) == DROP
        assert rig.since(before) == {"held_packets": 3}
        rig.control.suspend(0)
        assert rig.control.commit(0) == 3
        pieces = [Ether(frame) for frame in drain(seen)]
    assert [(p[TCP].seq, len(p[TCP].payload), str(p[TCP].flags)) for p in pieces] == [
        (1000, 1000, "A"),
        (2000, 1000, "A"),
        (3000, 560, "PA"),
    ]
    assert b"".join(bytes(p[TCP].payload) for p in pieces) == data
    assert all(sums_hold(p) for p in pieces)


# ---- exemptions ------------------------------------------------------------------------------------------------------

EXEMPT: list[tuple[str, dict[str, Any], dict[str, Any], bool]] = [
    ("all", {"guest_port": 123, "remote": "0.0.0.0/0"}, {}, True),
    ("prefix", {"guest_port": 123, "remote": "10.77.0.0/24"}, {}, True),
    ("one-address", {"guest_port": 123, "remote": CLIENT_4}, {}, True),
    ("every-port", {"guest_port": 0, "remote": "10.0.0.0/8"}, {}, True),
    ("other-prefix", {"guest_port": 123, "remote": "10.78.0.0/16"}, {}, False),
    ("other-port", {"guest_port": 124, "remote": "0.0.0.0/0"}, {}, False),
    ("other-family", {"guest_port": 123, "remote": "10.0.0.0/8"}, {"family": 6}, False),
    ("ipv6", {"guest_port": 123, "remote": "fd00::/8"}, {"family": 6}, True),
    ("ipv6-other", {"guest_port": 123, "remote": "fe80::/10"}, {"family": 6}, False),
]


@pytest.mark.parametrize(("entry", "where", "exempted"), [row[1:] for row in EXEMPT], ids=[row[0] for row in EXEMPT])
def test_exemptions(rig: Rig, entry: dict[str, Any], where: dict[str, Any], exempted: bool) -> None:
    frame = udp(123, b"what time is it", **where)
    rig.control.exempt_add(17, **entry)
    try:
        before = rig.counters()
        assert rig.output(frame) == (PASS if exempted else DROP)
        assert rig.since(before) == ({"exempt": 1} if exempted else HELD)
        assert rig.arrive(frame).verdict == (XDP_DROP if exempted else XDP_PASS), "the SVM's twin proves nothing"
        before = rig.counters()
        rig.output(tcp(123, 1, b"of another protocol", **where))
        assert rig.since(before) == HELD
    finally:
        assert rig.control.exempt_del(17, **entry)
    before = rig.counters()
    assert rig.output(frame) == DROP, "still exempt"
    assert not rig.control.exempt_del(17, **entry)


@pytest.mark.parametrize("entry", [(17, 123, "nowhere"), (256, 123, "::/0"), (17, 70_000, "::/0"), (17, 1, "::/0", 64)])
def test_an_exemption_that_makes_no_sense_is_a_sentence(rig: Rig, entry: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match=r"remote|exemption"):
        rig.control.exempt_add(*entry)


# ---- full tables, and what waits too long ----------------------------------------------------------------------------


def test_a_full_slab_refuses_the_newest_and_asks_for_a_checkpoint(rig: Rig) -> None:
    frames = [udp(30_000 + n % 100, bytes([n % 256]) * 4) for n in range(SIZES.slots + 20)]
    with reentering() as seen:
        before = rig.counters()
        for frame in frames:
            rig.output(frame)
        after = rig.since(before)
        held = after["held_packets"]
        assert SIZES.slots * 3 // 4 < held <= SIZES.slots, "the last slots are for what others wait for"
        assert after.get("dropped.no_slot", 0) + after.get("dropped.fifo_full", 0) == len(frames) - held
        assert [e["reason"] for e in rig.control.events() if e["kind"] == "high_water"] == ["no_slot"]
        rig.control.suspend(0)
        assert rig.control.commit(0) == held
        assert sorted(drain(seen)) == sorted(frames[:held]), "what was accepted was lost"
    assert rig.slots_used() == 0


def test_a_full_flow_table_refuses_new_flows_only(rig: Rig) -> None:
    for port in range(SIZES.flows):
        assert rig.arrive(udp(1 + port, b"x")).verdict == XDP_PASS
    before = rig.counters()
    assert rig.output(udp(5, b"known")) == DROP
    assert rig.output(udp(60_000, b"new")) == DROP
    after = rig.since(before)
    assert (after["held_packets"], after["dropped.no_flow"]) == (1, 1)
    assert "no_flow" in [e["reason"] for e in rig.control.events() if e["kind"] == "high_water"]
    rig.age_flows()
    before = rig.counters()
    rig.output(udp(60_001, b"the table cleans itself"))
    assert rig.since(before) == HELD


def test_the_sweep_tells_what_waits_and_ends_what_is_idle(rig: Rig) -> None:
    port, idle = next_port(), next_port()
    rig.output(udp(port, b"of the PVM alone"))
    assert rig.arrive(udp(idle, b"x")).verdict == XDP_PASS
    rig.control.sweep()
    assert rig.control.events() == [], "nothing is late yet"
    rig.set_timeout(1)
    before = rig.counters()
    rig.control.sweep()
    assert rig.since(before) == {"timeouts": 1, "divergences.missing_on_svm": 1}
    (event,) = rig.control.events()
    assert (event["kind"], event["reason"], event["flow"]["guest_port"]) == ("timeout", "missing_on_svm", port)
    assert event["pvm_digest"] != "0" * 16
    rig.control.sweep()
    assert rig.control.events() == [], "told twice"
    rig.age_flows()
    rig.control.sweep()
    assert [flow.p_count for flow in rig.flows()] == [1], "the idle flow should be gone, the held one not"


def test_what_comes_back_after_the_right_to_speak_has_ended_is_dropped(rig: Rig) -> None:
    frame = udp(next_port(), b"was released")
    for state, verdict, dropped in ((State.LOCKSTEP, PASS, 0), (State.HALTED, DROP, 1)):
        rig.control.set_state(0, state)
        before = rig.counters()
        assert rig.output(frame, mark=rig.mark) == verdict
        since = rig.since(before)
        assert (since["reentered"], since.get("dropped.halted", 0)) == (1, dropped)


def test_a_new_protection_knows_nothing_of_the_last_ones_streams(rig: Rig) -> None:
    """What the PVM sends without protection is not looked at: 2 GiB further on, new bytes would look like old ones."""
    port = next_port()
    rig.output(tcp(port, 1000, b"a" * 100))
    rig.control.suspend(0)
    rig.control.commit(0)
    rig.control.set_state(0, State.UNPROTECTED)
    rig.control.set_state(0, State.SYNCING)
    assert rig.output(tcp(port, 1000 + 2**31, b"b" * 500)) == PASS
    rig.control.suspend(0)
    rig.control.commit(0)
    before = rig.counters()
    assert rig.output(tcp(port, 1500 + 2**31, b"c" * 100)) == DROP
    assert rig.since(before) == HELD


@pytest.mark.parametrize(("state", "released"), [(State.LOCKSTEP, 0), (State.PASSTHROUGH, 3)])
def test_what_comes_back_without_the_svm_releases_the_rest(rig: Rig, state: State, released: int) -> None:
    port = next_port()
    for data in (b"one", b"two", b"three"):
        rig.output(udp(port, data))
    (index,) = [i for i in range(rig.flow_top()) if rig.flow(i).flags & 1 and rig.flow(i).p_count]
    flow = rig.flow(index)
    flow.in_flight, flow.emit_ns = 1, time.monotonic_ns()
    flow.generation = 1 << 20  # what a released packet carries of it is 0: BPF_PROG_TEST_RUN can't give it more
    bpfsys.update(rig.control.fd("flows"), ct.c_uint32(index), flow)
    rig.control.set_state(0, state)
    before = rig.counters()
    rig.output(udp(port, b"zero"), mark=rig.mark | index)
    assert rig.since(before).get("unheld_packets", 0) == released


@pytest.mark.parametrize(("state", "ack"), [(State.LOCKSTEP, 8000), (State.PASSTHROUGH, 9000)])
def test_a_whole_super_packets_ack_without_the_svm(rig: Rig, state: State, ack: int) -> None:
    """It is split as the flow was busy when it came, and isn't any more when its segments are held."""
    port, data = next_port(), b"x" * 300
    prove(rig, tcp(port, 1, data, ack=8000))
    (index,) = [i for i in range(rig.flow_top()) if rig.flow(i).flags & 1 and rig.flow(i).s_count]
    rig.control.set_state(0, state)
    context = bytearray(bpfsys.SK_BUFF_BYTES)
    struct.pack_into("=I", context, SKB_IFINDEX, rig.ifindex["vif0"])
    struct.pack_into("=I", context, SKB_GSO_SIZE, 100)
    struct.pack_into("=2I", context, SKB_CB, index, rig.flow(index).generation)
    run = bpfsys.test_run(rig.plane.prog_fd("split"), tcp(port, 1, data, ack=9000), ctx=bytes(context), want_ctx=192)
    assert run.retval == PASS
    assert Ether(run.data)[TCP].ack == ack


def test_what_never_came_back_is_not_waited_for_for_ever(rig: Rig) -> None:
    port = next_port()
    rig.output(udp(port, b"first"))
    (index,) = [i for i in range(rig.flow_top()) if rig.flow(i).flags & 1 and rig.flow(i).p_count]
    flow = rig.flow(index)
    flow.in_flight, flow.emit_ns = 7, 1
    bpfsys.update(rig.control.fd("flows"), ct.c_uint32(index), flow)
    rig.control.suspend(0)
    rig.control.commit(0)
    assert rig.flow(index).in_flight <= 1


def test_a_pairs_own_compare_timeout_counts_for_it(rig: Rig) -> None:
    rig.output(udp(next_port(), b"of the PVM alone"))
    rig.control.set_compare_timeout(1, 1)  # another pair's
    rig.control.sweep()
    assert rig.control.events() == []
    rig.control.set_compare_timeout(0, 1)
    rig.control.sweep()
    assert [event["kind"] for event in rig.control.events()] == ["timeout"]
    rig.control.set_compare_timeout(0, NEVER_NS)
    rig.set_timeout(1)  # the host's is for pairs without one
    rig.output(udp(next_port(), b"of the PVM alone"))
    rig.control.sweep()
    assert rig.control.events() == []
    rig.control.set_compare_timeout(0, 0)
    rig.control.sweep()
    assert [event["kind"] for event in rig.control.events()] == ["timeout"]


# ---- helpers ---------------------------------------------------------------------------------------------------------


def prove(rig: Rig, frame: bytes) -> None:
    """The SVM sends `frame`: through XDP and the device's own stack to P4."""
    before = rig.counters()["svm_parked"]
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as port:
        port.bind(("fwd0p", 0))
        port.send(frame)
    end = time.monotonic() + 60
    while rig.counters()["svm_parked"] == before:
        assert time.monotonic() < end, "the SVM's frame was not parked"


class reentering:
    """A socket that sees what is sent back into vif0."""

    def __enter__(self) -> socket.socket:
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RECEIVE_BYTES)
        self._socket.bind(("vif0", ETH_P_ALL))
        self._socket.setblocking(False)
        return self._socket

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def drain(port: socket.socket) -> list[bytes]:
    """All that was sent."""
    pass_all_cpus()
    found = []
    while True:
        try:
            found.append(port.recv(4096))
        except BlockingIOError:
            return found


def pseudo_header_sum(frame: bytes, family: int) -> int:
    """What a guest with checksum offload leaves in the field."""
    l3, l4 = 14, 14 + (20 if family == 4 else 40)
    ends = frame[l3 + 12 : l3 + 20] if family == 4 else frame[l3 + 8 : l3 + 40]
    data = ends + (len(frame) - l4).to_bytes(4, "big") + b"\0\0\0\x06"
    total = sum(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def sums_hold(packet: Packet) -> bool:
    """Are the IP and the TCP checksum what scapy computes?"""
    again = packet.copy()
    del again[IP].chksum, again[TCP].chksum
    made = Ether(bytes(again))
    return (made[IP].chksum, made[TCP].chksum) == (packet[IP].chksum, packet[TCP].chksum)
