"""A million mutated frames on every hook: nothing crashes or passes uncompared, each slot and frame accounted for."""

from __future__ import annotations

import ctypes as ct
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, ICMPv6ND_NS, IPv6ExtHdrDestOpt, IPv6ExtHdrFragment, IPv6ExtHdrHopByHop
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Raw

from coloebpf.model import DROPS, Policy, State
from tests.fence import pass_all_cpus
from tests.unit.rig import (
    CLIENT_4,
    CLIENT_MAC,
    GAUGE_FLOWS_USED,
    GUEST_4,
    GUEST_MAC,
    NONE,
    Rig,
    frame_of,
    tcp,
    udp,
)

pytestmark = [
    pytest.mark.kernel,
    pytest.mark.timeout(3000),
]  # tests/vm: an emulated machine that gets the time that others leave

# An emulated machine shows each frame some 30 times slower: tests/vm asks for fewer.
FRAMES = int(os.environ.get("COLOEBPF_FUZZ_FRAMES", "1000000"))
BATCH = 2000  # frames between two checkpoints, more than the slab takes
LOOK_EVERY = 25  # batches; then the whole table is walked through
STALE_S = 0.6  # EMIT_STALE_NS of bpf/constants.h and a little: what a program sent and nobody brought back is given up
KEPT = 20_000
FRAME_MAX = 1600
SKB, XDP, XDP_LIVE = range(3)
PASSED, DROPPED, REDIRECTED, OTHER, REFUSED = range(5)
ND_TYPES = {130, 131, 132, 133, 134, 135, 136, 137, 143}


class Hook(ct.Structure):
    """struct hook of fuzz.c."""

    _fields_ = [
        ("program", ct.c_int32),
        ("ifindex", ct.c_uint32),
        ("kind", ct.c_uint32),
        ("one_in", ct.c_uint32),
        ("gso_size", ct.c_uint32),
        ("outcomes", ct.c_uint64 * 5),
    ]


class Frame(ct.Structure):
    """struct frame of fuzz.c."""

    _fields_ = [("length", ct.c_uint32), ("byte", ct.c_uint8 * FRAME_MAX)]

    def raw(self) -> bytes:
        return bytes(self.byte[: self.length])


class Fuzzer:
    """The compiled helper and the frames that it starts from."""

    def __init__(self, library: Path, rig: Rig) -> None:
        self._call = ct.CDLL(str(library), use_errno=True).fuzz
        self._call.restype = ct.c_int64
        self.rig, self.seed = rig, 1
        self.sent = 0

    def hook(self, program: str, device: str, kind: int = SKB, one_in: int = 1, gso_size: int = 0) -> Hook:
        return Hook(self.rig.plane.prog_fd(program), self.rig.ifindex[device], kind, one_in, gso_size)

    def show(self, frames: list[bytes], hooks: list[Hook], count: int) -> list[bytes]:
        """`count` mutations of `frames` to `hooks`; what the first of them passed."""
        templates = (Frame * len(frames))(*[Frame(len(f), (ct.c_uint8 * FRAME_MAX)(*f)) for f in frames])
        for hook in hooks:
            hook.outcomes[:] = [0] * len(hook.outcomes)
        array = (Hook * len(hooks))(*hooks)
        kept = (Frame * KEPT)()
        self.seed += 1
        found = self._call(
            ct.c_uint64(self.seed * 0x9E3779B97F4A7C15 & (1 << 64) - 1),
            ct.c_uint64(count),
            templates,
            len(frames),
            array,
            len(hooks),
            kept,
            KEPT,
        )
        assert found >= 0, f"BPF_PROG_TEST_RUN: {os.strerror(-found)}"
        for hook, after in zip(hooks, array, strict=True):
            hook.outcomes[:] = after.outcomes[:]
        self.sent += count
        return [kept[i].raw() for i in range(found)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("fuzz") / "fuzz.so"
    flags = ("-O2", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")
    command = ["gcc", *flags, "-o", str(target), str(Path(__file__).with_name("fuzz.c"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def fuzzer(library: Path, rig: Rig) -> Iterator[Fuzzer]:
    yield Fuzzer(library, rig)
    time.sleep(STALE_S)


def frames(output: bool) -> list[bytes]:
    """Whole frames of every kind that the programs know, from the guest or to it."""
    way: dict[str, Any] = {"output": output}
    noise = random.Random(3)
    made = [
        *(tcp(5000 + n, 1000, noise.randbytes(n), **way) for n in (0, 1, 60, 1400)),
        tcp(5010, 7, flags="S", options=[("MSS", 1460), ("SAckOK", b""), ("Timestamp", (1, 0)), ("WScale", 7)], **way),
        tcp(5011, 7, b"abc", flags="SA", options=[("MSS", 1460), ("Timestamp", (9, 1))], **way),
        tcp(5012, 7, b"bye", flags="FA", options=[("Timestamp", (9, 1)), ("SAck", (5, 9, 20, 30, 40, 50))], **way),
        tcp(5013, 7, flags="R", **way),
        tcp(5014, 7, b"six", family=6, options=[("NOP", None), ("Timestamp", (9, 1))], **way),
        tcp(5015, 7, b"tagged", tags=(("ad", 3), ("q", 4)), **way),
        *(udp(5020 + n, noise.randbytes(n), **way) for n in (0, 8, 1200)),
        udp(5030, b"six", family=6, tags=(("q", 9),), **way),
        frame_of(layer=ICMP() / Raw(b"ping"), **way),
        frame_of(layer=ICMPv6EchoRequest(data=b"ping"), family=6, **way),
        frame_of(layer=ICMPv6ND_NS(tgt="fd77::1"), family=6, **way),
        frame_of(
            layer=IPv6ExtHdrHopByHop() / IPv6ExtHdrDestOpt() / UDP(sport=5031, dport=9) / Raw(b"far"), family=6, **way
        ),
        frame_of(layer=IPv6ExtHdrFragment(nh=17, offset=0, m=1, id=4) / Raw(bytes(64)), family=6, **way),
        frame_of(layer=Raw(bytes(64)), ip={"proto": 17, "flags": "MF", "id": 4}, **way),
        frame_of(layer=Raw(bytes(40)), ip={"proto": 17, "frag": 8, "id": 4}, **way),
        frame_of(layer=Raw(b"esp"), ip={"proto": 50, "options": [Raw(b"\x94\x04\0\0")]}, **way),
        Ether(src=GUEST_MAC, dst=CLIENT_MAC) / ARP(psrc=GUEST_4, pdst=CLIENT_4),
        Ether(src=GUEST_MAC, dst=CLIENT_MAC, type=0x88B5) / Raw(b"neither"),
    ]
    return [bytes(frame) for frame in made]


def above_ip(frame: bytes) -> tuple[int, int]:
    """IP protocol and where its header begins, found without bpf/parse.h; (-1, 0) of ARP, (-2, 0) of all else."""
    at, kind = 14, frame[12:14]
    for _ in range(2):
        if kind in (b"\x81\x00", b"\x88\xa8"):
            kind, at = frame[at + 2 : at + 4], at + 4
    if kind == b"\x08\x06":
        return -1, 0
    if kind == b"\x08\x00" and len(frame) >= at + 20:
        return frame[at + 9], at + (frame[at] & 15) * 4
    if kind != b"\x86\xdd" or len(frame) < at + 40:
        return -2, 0
    proto, at = frame[at + 6], at + 40
    for _ in range(6):
        if proto not in (0, 43, 44, 51, 60):
            break
        step = 8 if proto == 44 else (frame[at + 1] + 2) * 4 if proto == 51 else (frame[at + 1] + 1) * 8
        proto, at = frame[at], at + step
    return proto, at


def is_arp_or_nd(frame: bytes) -> bool:
    """What the default policies let pass."""
    proto, at = above_ip(frame)
    return proto == -1 or (proto == 58 and frame[at] in ND_TYPES)


def is_tcp(frame: bytes) -> bool:
    return above_ip(frame)[0] == 6


def linked(rig: Rig) -> tuple[int, int]:
    """Walks all lists: how many records the PVM's and the SVM's have. Each slot is in one list, once."""
    following = [record.next for record in rig.records()]
    seen: set[int] = set()
    totals = [0, 0]
    for flow in rig.flows():
        for side, (head, tail, count) in enumerate(
            ((flow.p_head, flow.p_tail, flow.p_count), (flow.s_head, flow.s_tail, flow.s_count))
        ):
            here, last, steps = head, NONE, 0
            while here != NONE:
                assert here not in seen, f"slot {here} is in two lists"
                seen.add(here)
                here, last, steps = following[here], here, steps + 1
            assert (steps, last) == (count, tail), "a list's length or end is wrong"
            totals[side] += steps
    return totals[0], totals[1]


def assert_slots_add_up(rig: Rig) -> None:
    for _ in range(3):  # some hooks have let live frames on: P3's go on to P4, P4's come back through the vif
        pass_all_cpus()
    held, parked = linked(rig)
    counters = rig.counters()
    assert held == counters["held_packets"] - counters["unheld_packets"]
    assert parked == counters["svm_parked"] - counters["svm_unparked"]
    assert held + parked == rig.slots_used(), "slots used are not the slots in lists"
    assert len(rig.flows()) == rig.gauge(GAUGE_FLOWS_USED)


def assert_nothing_left(rig: Rig) -> None:
    time.sleep(STALE_S)
    rig.reset()
    assert linked(rig) == (0, 0)
    assert rig.slots_used() == 0
    assert rig.gauge(GAUGE_FLOWS_USED) == 0


def batches(share: int) -> range:
    """So many batches make one of `share` parts of all frames."""
    return range(max(FRAMES // share // BATCH, 2))


def passes(counters: dict[str, int]) -> int:
    """Frames that P2 let go on."""
    return sum(counters.get(name, 0) for name in ("unprotected", "policy_passed", "exempt", "released_unchanged"))


def checkpoint(rig: Rig) -> None:
    rig.control.suspend(0)
    rig.control.commit(0)


def test_with_a_silent_svm_only_policy_lets_frames_pass(fuzzer: Fuzzer) -> None:
    rig, p2 = fuzzer.rig, fuzzer.hook("p2_output", "vif0")
    for number in batches(share=4):
        before = rig.counters()
        passed = fuzzer.show(frames(output=True), [p2], BATCH)
        after, ran = rig.since(before), sum(p2.outcomes) - p2.outcomes[REFUSED]
        assert rig.counters()["output_packets"] - before["output_packets"] == ran
        dropped = sum(after.get(f"dropped.{name}", 0) for name in DROPS)
        assert ran == passes(after) + after.get("held_packets", 0) + dropped, after
        assert p2.outcomes[PASSED] == passes(after) == len(passed)
        uncompared = [frame for frame in passed if not is_arp_or_nd(frame)]
        # What lies before the position at which a TCP flow was first seen was sent before the protection.
        again = after.get("retransmissions", 0)
        assert len(uncompared) == again == after.get("released_unchanged", 0), [frame.hex() for frame in uncompared]
        assert all(map(is_tcp, uncompared)), [frame.hex() for frame in uncompared]
        if number % LOOK_EVERY == 0:
            assert_slots_add_up(rig)
        rig.reset()  # no flow stays: what was committed once may be said again
    assert_nothing_left(rig)


def test_both_vms_output_on_all_of_the_primarys_hooks(fuzzer: Fuzzer) -> None:
    rig = fuzzer.rig
    hooks = [
        fuzzer.hook("p2_output", "vif0", one_in=2),
        fuzzer.hook("link_arrive", "fwd0", XDP, one_in=2),
        fuzzer.hook("link_arrive", "fwd0", XDP_LIVE, one_in=8),
        fuzzer.hook("p1_mirror", "vif0", one_in=4),
    ]
    proven, choose = 0, random.Random(4).choice
    for number in batches(share=2):
        rig.set_policy(*(choose(list(Policy)) for _ in range(3)))
        before = rig.counters()
        fuzzer.show(frames(output=True), hooks, BATCH)
        after = rig.since(before)
        assert hooks[0].outcomes[PASSED] == passes(after), after
        assert after.get("mirrored_packets", 0) == sum(hooks[3].outcomes) - hooks[3].outcomes[REFUSED]
        proven += after.get("compared_packets", 0)
        if number % 2:
            checkpoint(rig)
        if number % LOOK_EVERY == 0:
            assert_slots_add_up(rig)
            rig.age_flows()
    assert proven, "no frame was ever proven: the SVM's never came to P4"
    assert_nothing_left(rig)


@pytest.mark.parametrize(
    "state",
    [State.LOCKSTEP, State.CHECKPOINTING, State.PASSTHROUGH, State.PROMOTED, State.HALTED],
    ids=lambda s: s.name,
)
def test_each_state_on_all_hooks(fuzzer: Fuzzer, state: State) -> None:
    rig = fuzzer.rig
    output = [
        fuzzer.hook("p2_output", "vif0"),
        fuzzer.hook("link_arrive", "fwd0", XDP),
        fuzzer.hook("s2_output", "vif1"),
        fuzzer.hook("p2_output", "vif0", one_in=4, gso_size=1 + fuzzer.seed * 100),
    ]
    to_guest = [
        fuzzer.hook("s3_isolate", "vif1"),
        fuzzer.hook("link_arrive", "fwd1", XDP),
        fuzzer.hook("link_arrive", "fwd1", XDP_LIVE, one_in=16),
        fuzzer.hook("p1_mirror", "vif0"),
    ]
    for pair in (0, 1):
        rig.control.set_state(pair, state)
    before = rig.counters()
    for number in batches(share=4 * 5):
        output[3].gso_size = 100 + 50 * (number % 20)
        fuzzer.show(frames(output=True), output, BATCH)
        isolated = fuzzer.show(frames(output=False), to_guest, BATCH)
        if state != State.PROMOTED:
            assert not isolated, "the SVM heard the bridge"
        rig.control.kick()
    if state in (State.HALTED, State.PROMOTED):
        assert not passes(rig.since(before)), "a halted primary spoke"
    assert_slots_add_up(rig)
    assert_nothing_left(rig)
