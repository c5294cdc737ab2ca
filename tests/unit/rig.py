"""Runs the hooks on single frames by BPF_PROG_TEST_RUN, and reads what they wrote into the maps."""

from __future__ import annotations

import ctypes as ct
import itertools
import socket
import struct
from dataclasses import dataclass
from typing import Any

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

from coloebpf import bpfsys, snapshot
from coloebpf.bpfsys import TestRun
from coloebpf.control import Control
from coloebpf.dataplane import Dataplane
from coloebpf.model import DROPS, REASONS, Policy, State

MTU = 1500
GUEST_MAC, CLIENT_MAC, OTHER_MAC = "02:c0:10:00:00:01", "02:c0:20:00:00:01", "02:c0:30:00:00:01"
GUEST_4, CLIENT_4, GUEST_6, CLIENT_6 = "10.77.0.10", "10.77.0.1", "fd77::10", "fd77::1"
PASS, DROP, REDIRECT = -1, 2, 7  # verdicts of tc programs
XDP_DROP, XDP_PASS = 1, 2
NONE = 0xFFFFFFFF
NEVER_NS = 3600 * 10**9
LONG_AGO_NS = 1_000_000 * 10**9  # longer than any idle limit (IDLE_* of bpf/constants.h)
# Offsets in struct __sk_buff (linux/bpf.h) of what BPF_PROG_TEST_RUN takes.
SKB_IFINDEX, SKB_MARK, SKB_CB, SKB_GSO_SEGS, SKB_GSO_SIZE = 40, 8, 48, 164, 176
XDP_MD = struct.Struct("=6I")  # data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex
# struct arrival of bpf/types.h: it is in no map, so bcc describes it nowhere.
ARRIVAL = struct.Struct("=QIIIHHHHHBB")
HELD = struct.Struct("=IIQQIIIIIIHHHHBBHxxxx")  # struct held, likewise: next, flow, digest, since_ns, from, end, ...
STREAM_WORDS, DGRAM_WORDS = 512, 16384  # bpf/constants.h
GAUGE_SLOTS_USED, GAUGE_FLOWS_USED, GAUGE_FLOW_TOP = 0, 1, 2

_ports = itertools.count(20_000)


def next_port() -> int:
    """A guest's port that no flow of this session has."""
    return next(_ports)


@dataclass(frozen=True)
class Arrival:
    """What XDP on fwd made of a frame."""

    verdict: int
    frame: bytes
    digest: int = 0
    flow: int = NONE
    start: int = 0  # first position of the range
    length: int = 0
    payload: int = 0  # its offset in the frame
    type: int = 0
    flags: int = 0


@dataclass(frozen=True)
class Held:
    """The first fields of a struct held."""

    next: int
    flow: int
    digest: int
    since_ns: int
    start: int
    end: int
    first: int
    ack: int


def frame_of(
    *,
    family: int = 4,
    guest_port: int | None = None,
    output: bool = True,
    tags: tuple[tuple[str, int], ...] = (),
    layer: Packet | None = None,
    ip: dict[str, Any] | None = None,
    macs: tuple[str, str] = (GUEST_MAC, CLIENT_MAC),
) -> Packet:
    """Ethernet, tags and IP of the guest's output (or of the client's) with `layer` on it."""
    source, target = macs if output else macs[::-1]
    frame: Packet = Ether(src=source, dst=target)
    for kind, number in tags:
        frame = frame / (Dot1Q(vlan=number) if kind == "q" else Dot1AD(vlan=number))
    ends = (GUEST_4, CLIENT_4) if family == 4 else (GUEST_6, CLIENT_6)
    a, b = ends if output else ends[::-1]
    frame = frame / (IP(src=a, dst=b, **(ip or {})) if family == 4 else IPv6(src=a, dst=b, **(ip or {})))
    return frame / layer if layer is not None else frame


def tcp(
    port: int,
    seq: int,
    data: bytes = b"",
    flags: str = "A",
    *,
    ack: int = 1,
    options: Any = (),
    output: bool = True,
    **where: Any,
) -> bytes:
    """A TCP segment between the guest's `port` and the client's 40,000."""
    ports = (port, 40_000) if output else (40_000, port)
    layer = TCP(
        sport=ports[0], dport=ports[1], seq=seq & 0xFFFFFFFF, ack=ack & 0xFFFFFFFF, flags=flags, options=list(options)
    )
    return bytes(frame_of(layer=layer / Raw(data), output=output, **where))


def udp(port: int, data: bytes, *, remote_port: int = 40_000, output: bool = True, **where: Any) -> bytes:
    """A datagram between the guest's `port` and the client's."""
    ports = (port, remote_port) if output else (remote_port, port)
    return bytes(frame_of(layer=UDP(sport=ports[0], dport=ports[1]) / Raw(data), output=output, **where))


class Rig:
    """A loaded dataplane in a namespace; the caller is inside it."""

    def __init__(self, namespace: str, plane: Dataplane, control: Control) -> None:
        self.namespace, self.plane, self.control = namespace, plane, control
        names = ("vif0", "fwd0", "vif1", "fwd1")
        self.ifindex = {name: socket.if_nametoindex(name) for name in names}
        settings = control.shapes.leaf("settings")()
        bpfsys.lookup(control.fd("settings"), ct.c_uint32(0), settings)
        self.mark = int(settings.mark)
        self._keys: tuple[list[int], list[int], int, int] | None = None

    # ---- a clean table for each test -------------------------------------------------------------------------------

    def reset(self) -> None:
        """Lets go of what is held, ends every flow, and brings both pairs to lock-step."""
        self.set_timeout(NEVER_NS)
        self.set_policy()
        for pair in (0, 1):
            self.control.set_deadline(pair, 0)
            self.control.set_compare_timeout(pair, 0)
        self.control.set_state(0, State.LOCKSTEP)
        for _ in range(100):
            self.control.suspend(0)
            self.control.commit(0)
            if not any(flow.p_count or flow.s_count for flow in self.flows()):
                break
        self.age_flows()
        self.control.sweep()
        self.control.set_state(1, State.LOCKSTEP)
        self.control.events(0)

    def age_flows(self) -> None:
        """Makes every flow older than any idle limit. (Nobody else writes to them now.)"""
        fd = self.control.fd("flows")
        for index in range(self.flow_top()):
            flow = self.control.shapes.leaf("flows")()
            bpfsys.lookup(fd, ct.c_uint32(index), flow)
            if flow.flags & 1:
                flow.emit_ns = flow.in_flight = 0
                flow.last_ns = (1 << 64) - LONG_AGO_NS
                bpfsys.update(fd, ct.c_uint32(index), flow)

    def set_timeout(self, ns: int) -> None:
        """The time after which something held is late."""
        settings = self.control.shapes.leaf("settings")()
        bpfsys.lookup(self.control.fd("settings"), ct.c_uint32(0), settings)
        settings.compare_timeout_ns = ns
        bpfsys.update(self.control.fd("settings"), ct.c_uint32(0), settings)

    def set_policy(self, arp: Policy = Policy.PASS, nd: Policy = Policy.PASS, other: Policy = Policy.COMPARE) -> None:
        """The policies of the primary's NIC."""
        value = self.control.shapes.leaf("nic_by_id")()
        bpfsys.lookup(self.control.fd("nic_by_id"), ct.c_uint32(0), value)
        value.arp, value.nd, value.other = int(arp), int(nd), int(other)
        bpfsys.update(self.control.fd("nic_by_id"), ct.c_uint32(0), value)
        bpfsys.update(self.control.fd("nics"), ct.c_uint32(value.vif), value)

    # ---- running ---------------------------------------------------------------------------------------------------

    def run(self, program: str, frame: bytes, device: str, *, mark: int = 0, gso_size: int = 0) -> TestRun:
        """A tc program, as if `frame` were at `device`."""
        context = bytearray(bpfsys.SK_BUFF_BYTES)
        struct.pack_into("=I", context, SKB_IFINDEX, self.ifindex[device])
        struct.pack_into("=I", context, SKB_MARK, mark)
        struct.pack_into("=I", context, SKB_GSO_SIZE, gso_size)
        return bpfsys.test_run(self.plane.prog_fd(program), frame, ctx=bytes(context), want_ctx=len(context))

    def output(self, frame: bytes, **more: Any) -> int:
        """The PVM sends `frame`: P2's verdict."""
        return self.run("p2_output", frame, "vif0", **more).retval

    def arrive(self, frame: bytes, device: str = "fwd0") -> Arrival:
        """`frame` comes in on the forward link: what XDP hands on."""
        context = XDP_MD.pack(0, len(frame), 0, self.ifindex[device], 0, 0)
        got = bpfsys.test_run(self.plane.prog_fd("link_arrive"), frame, ctx=context, want_ctx=len(context))
        meta = XDP_MD.unpack(got.ctx)[0]
        if meta < ARRIVAL.size:
            return Arrival(got.retval, got.data)
        digest, flow, _, start, length, _, _, payload, _, kind, flags = ARRIVAL.unpack_from(got.data)
        return Arrival(got.retval, got.data[meta:], digest, flow, start, length, payload, kind, flags)

    # ---- looking ---------------------------------------------------------------------------------------------------

    def counters(self, nic: int = 0) -> dict[str, int]:
        """Counters of a NIC, flat: `dropped.no_slot` and so on among them."""
        raw = snapshot.counters(self.control, nic)
        flat = {name: getattr(raw, name) for name, *_ in raw._fields_ if name not in ("divergences", "dropped")}
        flat |= {f"divergences.{name}": raw.divergences[i] for i, name in enumerate(REASONS)}
        return flat | {f"dropped.{name}": raw.dropped[i] for i, name in enumerate(DROPS)}

    def since(self, before: dict[str, int], nic: int = 0) -> dict[str, int]:
        """The counters that have changed, but for those that only say how much came in, and by how much."""
        incoming = ("output_packets", "output_bytes", "segments", "svm_packets", "svm_bytes")
        now = self.counters(nic)
        return {name: now[name] - before[name] for name in now if now[name] != before[name] and name not in incoming}

    def gauge(self, number: int) -> int:
        value = ct.c_int64()
        bpfsys.lookup(self.control.fd("gauges"), ct.c_uint32(number), value)
        return value.value

    def slots_used(self) -> int:
        return snapshot.slots_used(self.control)

    def flow_top(self) -> int:
        return self.gauge(GAUGE_FLOW_TOP)

    def flow(self, index: int) -> Any:
        """struct flow number `index`."""
        flow = self.control.shapes.leaf("flows")()
        bpfsys.lookup(self.control.fd("flows"), ct.c_uint32(index), flow)
        return flow

    def flows(self) -> list[Any]:
        """All live ones."""
        return [flow for flow in map(self.flow, range(self.flow_top())) if flow.flags & 1]

    def records(self) -> list[Held]:
        """All of the table, linked or not."""
        table = self.control.shapes.leaf("held")()
        bpfsys.lookup(self.control.fd("held"), ct.c_uint32(0), table)
        return [Held(*fields[:8]) for fields in HELD.iter_unpack(bytes(table))]

    def held(self, slot: int) -> Held:
        """The record of one slot."""
        return self.records()[slot]

    def hash_keys(self) -> tuple[list[int], list[int], int, int]:
        """Keys of streams and of datagrams, of a FIN, of lengths."""
        if self._keys is None:
            raw = self.control.shapes.leaf("hash_keys")()
            bpfsys.lookup(self.control.fd("hash_keys"), ct.c_uint32(0), raw)
            words = list(struct.unpack(f"={ct.sizeof(raw) // 8}Q", bytes(raw)))
            pad = (len(words) - STREAM_WORDS - DGRAM_WORDS - 2) // 2
            second = STREAM_WORDS + pad
            self._keys = (words[:STREAM_WORDS], words[second : second + DGRAM_WORDS], words[-2], words[-1])
        return self._keys
