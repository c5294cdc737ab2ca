"""The ports of a bare lab: what is sent on a guest's is that VM's output, what the client's sees was released."""

from __future__ import annotations

import ctypes as ct
import socket
import struct
import subprocess
import time
from collections.abc import Iterable, Sequence
from typing import Any

from coloebpf import bpfsys, snapshot
from coloebpf.control import GAUGE_FLOW_TOP, Control
from coloebpf.events import event_of
from coloebpf.lab.plan import HOSTS, PAIR, LabPlan
from coloebpf.model import EVENTS, Policy, State
from coloebpf.netns import inside
from tests.fence import pass_all_cpus

ETH_P_ALL = 3
SOL_PACKET, PACKET_AUXDATA, PACKET_VNET_HDR = 263, 8, 15  # linux/if_packet.h
TAG_VALID = 0x10  # TP_STATUS_VLAN_VALID: the kernel keeps the outer tag beside the frame
PACKET_OUTGOING = 4
RECEIVE_BUFFER = 8 << 20  # bytes; a flush sends a thousand frames at once
WAIT = 20.0  # seconds for something that must come; it takes well under a millisecond on an idle machine
BURST = 200  # frames at once: veth drops what its ring of 256 has no room for while softirq waits for a CPU
ROUNDS = 3  # passes over all CPUs without any change of a counter: bridge and veth are two steps that count nothing
LONGEST = 70_000  # bytes of a frame, super-packets too
NEVER = 1 << 62  # ns
LONG_AGO_NS = 3600 * 10**9
FLOW_LIVE = 1  # bpf/types.h


class Wire:
    """The ports of a bare lab and the controls of its hosts."""

    def __init__(self, plan: LabPlan) -> None:
        self.plan = plan
        self.nics = plan.nic_list()
        self.client_mac = plan.client().mac
        self._ports: dict[tuple[str, str], socket.socket] = {}
        self.control: dict[str, Control] = {}
        for host in HOSTS:
            with inside(plan.namespace(host)):
                self.control[host] = Control.open(plan.pin_dir(host))
        with inside(plan.namespace("primary")):  # what leaves the host is what a real NIC would send
            for feature in ("tso", "gso", "tx", "gro"):
                subprocess.run(["ethtool", "-K", "eth0", feature, "off"], capture_output=True, check=False)
        for node in ("client", "pvm", "svm"):
            self.port(node)
        for host in HOSTS:
            self._set_timeout(host, NEVER)  # a test on a busy machine takes its time; see expire()

    def close(self) -> None:
        for port in self._ports.values():
            port.close()
        for control in self.control.values():
            control.close()

    def port(self, node: str, device: str = "eth0") -> socket.socket:
        """The packet socket on a device, opened at its first use."""
        if (node, device) not in self._ports:
            with inside(self.plan.namespace(node)):
                port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
            port.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUFFORCE if hasattr(socket, "SO_RCVBUFFORCE") else 33, RECEIVE_BUFFER
            )
            port.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
            port.bind((device, 0))
            port.setblocking(False)
            self._ports[node, device] = port
        return self._ports[node, device]

    # ---- sending and receiving -------------------------------------------------------------------------------------

    def send(self, node: str, frames: Iterable[bytes] | bytes, device: str = "eth0") -> None:
        """Send frames one after the other, and wait until the hosts are done with them."""
        for number, frame in enumerate([frames] if isinstance(frames, bytes) else frames, 1):
            self.push(node, frame, device)
            if number % BURST == 0:
                self.settle()
        self.settle()

    def push(self, node: str, frame: bytes, device: str = "eth0") -> None:
        """Send one frame and wait for nothing, unless the port is busy."""
        port, deadline = self.port(node, device), time.monotonic() + WAIT
        while True:
            try:
                port.send(frame)
                return
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.0005)

    def pvm(self, *frames: bytes, nic: int = 0) -> None:
        self.send("pvm", frames, f"eth{nic}")

    def svm(self, *frames: bytes, nic: int = 0) -> None:
        self.send("svm", frames, f"eth{nic}")

    def client(self, *frames: bytes) -> None:
        self.send("client", frames)

    def super_packet(self, frame: bytes, size: int, start: int, offset: int, kind: int, head: int) -> None:
        """PVM output as a guest with offloads sends it: `size` bytes of payload a segment, the checksum left open."""
        with inside(self.plan.namespace("pvm")):
            port = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
        with port:
            port.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
            port.bind(("eth0", ETH_P_ALL))
            port.send(struct.pack("<BBHHHH", 1, kind, head, size, start, offset) + frame)
        self.settle()

    def seen(self, node: str = "client", device: str = "eth0", outgoing: bool = False) -> list[bytes]:
        """Frames that have come to a port since the last call."""
        port = self.port(node, device)
        found: list[bytes] = []
        while True:
            try:
                frame, notes, _, address = port.recvmsg(LONGEST, 64)
            except BlockingIOError:
                return found
            if (address[2] == PACKET_OUTGOING) == outgoing:
                found.append(with_tag(frame, notes))

    def released(self, count: int | None = None) -> list[bytes]:
        """What the client has got; waits until it is `count` frames."""
        return self.await_frames("client", count)

    def await_frames(self, node: str, count: int | None = None, device: str = "eth0") -> list[bytes]:
        found = self.seen(node, device)
        deadline = time.monotonic() + WAIT
        while count is not None and len(found) < count and time.monotonic() < deadline:
            time.sleep(0.0005)
            found += self.seen(node, device)
        return found

    def settle(self) -> None:
        """Wait until no packet is on its way.

        Each pass moves each packet one step on.
        """
        before, quiet, deadline = self._all_counters(), 0, time.monotonic() + WAIT
        while quiet < ROUNDS:
            assert time.monotonic() < deadline, f"the counters still move after {WAIT} s"
            pass_all_cpus()
            now = self._all_counters()
            quiet = quiet + 1 if now == before else 0
            before = now

    def _all_counters(self) -> bytes:
        return b"".join(bytes(snapshot.counters(c, nic.nic)) for c in self.control.values() for nic in self.nics)

    # ---- looking into a host ---------------------------------------------------------------------------------------

    def status(self, host: str = "primary") -> dict[str, Any]:
        with inside(self.plan.namespace(host)):
            return self.control[host].snapshot()

    def nic(self, number: int = 0, host: str = "primary") -> Tally:
        """Counters of a NIC, flat: `divergences.payload`, `dropped.no_slot` and so on among them."""
        found = next(nic for nic in self.status(host)["nics"] if nic["nic"] == number)
        flat = {name: value for name, value in found.items() if isinstance(value, int)}
        for group in ("divergences", "dropped"):
            flat |= {f"{group}.{name}": value for name, value in found[group].items()}
        return Tally(flat)

    def last_event(self, kind: str, host: str = "primary") -> dict[str, Any]:
        """The last event of a kind. (The ring buffer is the lab agent's; this is the copy that the programs keep.)"""
        control = self.control[host]
        raw = control.shapes.leaf("last_events")()
        number = next(n for n, name in EVENTS.items() if name == kind)
        bpfsys.lookup(control.fd("last_events"), ct.c_uint32(number), raw)
        return event_of(raw)

    # ---- control ---------------------------------------------------------------------------------------------------

    def checkpoint(self) -> None:
        """One that commits at once, in the careful order."""
        self.control["secondary"].clear_translations(PAIR)
        self.control["primary"].suspend(PAIR)
        self.commit()

    def suspend(self) -> None:
        self.control["primary"].suspend(PAIR)

    def commit(self) -> None:
        with inside(self.plan.namespace("primary")):
            self.control["primary"].commit(PAIR)
        self.settle()

    def clean(self) -> None:
        """Lock-step with nothing held or parked, whatever the last case left."""
        status = self.nic()
        if status["held"] or status["parked"]:
            self.checkpoint()
        self.settle()
        for node in ("client", "pvm", "svm"):
            self.seen(node)

    def reset(self) -> None:
        """As new, whatever another module has left: lock-step, no flow, nothing held, default policies."""
        for control in self.control.values():
            control.set_deadline(PAIR, 0)
            control.set_open_after(PAIR, 0)
            control.set_state(PAIR, State.LOCKSTEP)
            for nic in self.nics:
                control.set_exempts(nic.nic, [])
        self.set_policy(arp=Policy.PASS, nd=Policy.PASS, other=Policy.COMPARE)
        self.checkpoint()
        for host, control in self.control.items():
            self.age_flows(host)
            control.sweep()
        self.seen("primary", "fwd0")
        self.clean()

    def age_flows(self, host: str) -> None:
        """Makes every flow older than any may be idle. (Nobody else writes to them now.)"""
        control, top = self.control[host], ct.c_uint64()
        bpfsys.lookup(control.fd("gauges"), ct.c_uint32(GAUGE_FLOW_TOP), top)
        for index in range(top.value):
            flow = control.shapes.leaf("flows")()
            if bpfsys.lookup(control.fd("flows"), ct.c_uint32(index), flow) and flow.flags & FLOW_LIVE:
                flow.emit_ns = flow.in_flight = 0
                flow.last_ns = (1 << 64) - LONG_AGO_NS
                bpfsys.update(control.fd("flows"), ct.c_uint32(index), flow)

    def kick(self) -> None:
        with inside(self.plan.namespace("primary")):
            self.control["primary"].kick()
        self.settle()

    def expire(self, host: str = "primary") -> None:
        """Let everything that is held be late, and have it looked for."""
        self._set_timeout(host, 1)
        with inside(self.plan.namespace(host)):
            self.control[host].sweep()
        self._set_timeout(host, NEVER)

    def _set_timeout(self, host: str, ns: int) -> None:
        control, settings, zero = self.control[host], self.control[host].shapes.leaf("settings")(), ct.c_uint32(0)
        bpfsys.lookup(control.fd("settings"), zero, settings)
        settings.compare_timeout_ns = ns
        bpfsys.update(control.fd("settings"), zero, settings)

    def set_policy(self, **policies: int) -> None:
        """Write the primary's policies (`arp`, `nd`, `other`) of NIC 0."""
        control = self.control["primary"]
        value = control.shapes.leaf("nic_by_id")()
        bpfsys.lookup(control.fd("nic_by_id"), ct.c_uint32(0), value)
        for name, policy in policies.items():
            setattr(value, name, int(policy))
        bpfsys.update(control.fd("nic_by_id"), ct.c_uint32(0), value)
        bpfsys.update(control.fd("nics"), ct.c_uint32(value.vif), value)

    def flows(self, port: int, host: str = "primary") -> list[Any]:
        """The live struct flow of a guest's port."""
        return list(self._flows(port, host).values())

    def note_work(self, port: int) -> None:
        """As if another CPU had left a note for the flow's owner. (Nobody else writes to the flow now.)"""
        for index, flow in self._flows(port, "primary").items():
            flow.work = 1
            bpfsys.update(self.control["primary"].fd("flows"), ct.c_uint32(index), flow)

    def _flows(self, port: int, host: str) -> dict[int, Any]:
        control = self.control[host]
        found = {}
        for key in bpfsys.keys(control.fd("flow_refs"), control.shapes.key("flow_refs")):
            if socket.ntohs(key.guest_port) == port:
                ref, flow = control.shapes.leaf("flow_refs")(), control.shapes.leaf("flows")()
                if bpfsys.lookup(control.fd("flow_refs"), key, ref):
                    bpfsys.lookup(control.fd("flows"), ct.c_uint32(ref.index), flow)
                    found[int(ref.index)] = flow
        return found


class Tally(dict[str, int]):
    """Counters at one moment."""

    def since(self, before: Tally) -> Tally:
        """Those that have changed, by how much."""
        return Tally({name: value - before[name] for name, value in self.items() if value != before[name]})

    def __missing__(self, name: str) -> int:
        return 0


def with_tag(frame: bytes, notes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """The frame with its outer VLAN tag back in place."""
    for level, kind, data in notes:
        if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
            status, tci, protocol = struct.unpack("=I12xHH", data[:20])
            if status & TAG_VALID:
                return frame[:12] + struct.pack("!HH", protocol, tci) + frame[12:]
    return frame
