"""After a promotion: tells switches and neighbours that the guest is here now.

Frames as the guest would send them, for each of its addresses an ARP request and reply (both, for some stacks heed only
one) and an unsolicited neighbour advertisement (RFC 4861, 7.2.6), and a RARP request, which has no address in it at all
and yet teaches every switch where the MAC is. They enter at the vif's ingress, so the bridge learns the port too, and
the hooks treat them like the guest's output: a host that may not speak does not announce either.

Only addresses that the SVM itself has sent from are announced (AddressBook), for an address of another machine would be
taken from it.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import ipaddress
import logging
import os
import socket
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coloebpf import bpfsys
from coloebpf.errors import AnnounceError, BpfError
from coloebpf.service.log import say

if TYPE_CHECKING:
    from coloebpf.control import Control

log = logging.getLogger(__name__)

PAUSES_S = (0.0, 0.05, 0.1, 0.2, 0.4)  # seconds before each round: frames get lost, and ports come up late
MOST = 64  # addresses of a NIC that are announced; more would be a router, whose neighbours know no more than its own
BROADCAST, ALL_NODES = b"\xff" * 6, b"\x33\x33\0\0\0\1"
ARP, RARP, IPV6 = 0x0806, 0x8035, 0x86DD
ARP_REQUEST, ARP_REPLY, RARP_REQUEST = 1, 2, 3
ALL_NODES_6 = ipaddress.IPv6Address("ff02::1")
ICMPV6, ADVERTISEMENT, OVERRIDE, TARGET_MAC = 58, 136, 0x20000000, 2
SHORTEST = 60  # bytes of an Ethernet frame without its checksum
TAG_PRESENT, TAG_AD, TAG_ID = 0x1000, 0x8000, 0xFFF  # in the tags of a flow's key (bpf/constants.h)
FLOW_LIVE, FLOW_SVM_ISN, FLOW_DELTA = 0x1, 0x2000, 0x8000  # bpf/types.h
GAUGE_FLOW_TOP = 2  # bpf/maps.h
PROG_LOAD, SCHED_CLS, CLONE_REDIRECT, F_INGRESS = 5, 3, 13, 1  # linux/bpf.h

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


@dataclass(frozen=True)
class Address:
    """One of the guest's; `tags`: 802.1Q or 802.1ad headers that the guest itself puts on, outer first."""

    ip: Ip
    tags: tuple[bytes, ...] = ()


# ---- frames ----------------------------------------------------------------------------------------------------------


def frames(mac: str, addresses: Iterable[Address]) -> list[bytes]:
    """One round. Raises AnnounceError if `mac` is none."""
    try:
        own = bytes.fromhex(mac.replace(":", ""))
    except ValueError as e:
        raise AnnounceError(f"{mac!r} is no MAC address") from e
    if len(own) != 6:
        raise AnnounceError(f"{mac!r} is no MAC address")
    known = sorted(addresses, key=lambda address: (address.tags, address.ip.version, int(address.ip)))
    tags = dict.fromkeys([(), *(address.tags for address in known)])
    made = [_frame(BROADCAST, own, tag, RARP, _arp(RARP_REQUEST, own, bytes(4), own, bytes(4))) for tag in tags]
    for address in known:
        ip = address.ip.packed
        if address.ip.version == 6:
            made.append(_frame(ALL_NODES, own, address.tags, IPV6, _advertisement(own, ip)))
            continue
        for kind, target in ((ARP_REQUEST, bytes(6)), (ARP_REPLY, BROADCAST)):
            made.append(_frame(BROADCAST, own, address.tags, ARP, _arp(kind, own, ip, target, ip)))
    return made


def _frame(to: bytes, source: bytes, tags: tuple[bytes, ...], kind: int, payload: bytes) -> bytes:
    whole = to + source + b"".join(tags) + struct.pack("!H", kind) + payload
    return whole.ljust(SHORTEST + sum(map(len, tags)), b"\0")


def _arp(kind: int, mac: bytes, ip: bytes, target_mac: bytes, target_ip: bytes) -> bytes:
    return struct.pack("!HHBBH", 1, 0x0800, 6, 4, kind) + mac + ip + target_mac + target_ip


def _advertisement(mac: bytes, ip: bytes) -> bytes:
    """IPv6 and ICMPv6; hop limit 255, or nobody would believe it."""
    body = struct.pack("!I", OVERRIDE) + ip + bytes([TARGET_MAC, 1]) + mac
    length = 4 + len(body)
    pseudo = ip + ALL_NODES_6.packed + struct.pack("!II", length, ICMPV6)
    check = _checksum(pseudo + struct.pack("!BBH", ADVERTISEMENT, 0, 0) + body)
    header = struct.pack("!IHBB", 6 << 28, length, ICMPV6, 255) + ip + ALL_NODES_6.packed
    return header + struct.pack("!BBH", ADVERTISEMENT, 0, check) + body


def _checksum(data: bytes) -> int:
    """RFC 1071; `data` has an even length."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


# ---- sending ---------------------------------------------------------------------------------------------------------


class _LoadAttr(ct.Structure):
    _fields_ = [
        ("prog_type", ct.c_uint32),
        ("insn_cnt", ct.c_uint32),
        ("insns", ct.c_uint64),
        ("license", ct.c_uint64),
        ("log_level", ct.c_uint32),
        ("log_size", ct.c_uint32),
        ("log_buf", ct.c_uint64),
        ("kern_version", ct.c_uint32),
        ("prog_flags", ct.c_uint32),
        ("prog_name", ct.c_char * 16),
    ]


class Injector:
    """Puts frames into a device's ingress, as if they had come from it. In the caller's network namespace.

    No socket can do that, so a program of four instructions does: clone_redirect(skb, device, BPF_F_INGRESS), run on
    each frame by BPF_PROG_TEST_RUN.
    """

    def __init__(self, device: str) -> None:
        """Raises AnnounceError if there is no such device, or the kernel won't."""
        self.device = device
        try:
            index = socket.if_nametoindex(device)
        except OSError as e:
            raise AnnounceError(f"device {device} does not exist in this network namespace") from e
        code = b"".join(
            struct.pack("<BBhi", *instruction)
            for instruction in (
                (0xB7, 2, 0, index),  # r2 = index; r1 is the skb already
                (0xB7, 3, 0, F_INGRESS),
                (0x85, 0, 0, CLONE_REDIRECT),
                (0x95, 0, 0, 0),  # exit with what it returned
            )
        )
        program, licence = ct.create_string_buffer(code, len(code)), ct.create_string_buffer(b"GPL")
        attr = _LoadAttr(
            prog_type=SCHED_CLS,
            insn_cnt=len(code) // 8,
            insns=ct.addressof(program),
            license=ct.addressof(licence),
            prog_name=b"announce",
        )
        try:
            self._fd = bpfsys.bpf(PROG_LOAD, attr)
        except OSError as e:
            raise AnnounceError(f"the kernel refuses the program that announces: {e.strerror}") from e

    def send(self, frame: bytes) -> None:
        """Raises AnnounceError if the device is gone or down."""
        try:
            result = bpfsys.test_run(self._fd, frame).retval
        except BpfError as e:
            raise AnnounceError(f"can't announce on {self.device}: {e}") from e
        if result != 0:
            raise AnnounceError(f"can't announce on {self.device}: {os.strerror(abs(result))}; is it up?")

    def close(self) -> None:
        os.close(self._fd)


async def announce(vif: str, mac: str, addresses: Callable[[], Iterable[Address]]) -> int:
    """All rounds; the pair must be promoted already, for the hooks judge these frames too. Returns how many were sent.

    `addresses` is asked before each round. Raises AnnounceError if the last round could not be sent.
    """
    sent = 0
    failed: AnnounceError | None = None
    injector = Injector(vif)
    try:
        for pause in PAUSES_S:
            await asyncio.sleep(pause)
            try:
                for frame in frames(mac, addresses()):
                    injector.send(frame)
                    sent += 1
                failed = None
            except AnnounceError as e:
                failed = e  # the port may be up when the next round comes
    finally:
        injector.close()
    if failed is not None:
        raise failed
    known = " ".join(sorted(str(address.ip) for address in addresses()))
    say(log, logging.INFO, "announced the guest", vif=vif, mac=mac, addresses=known or "none", frames=sent)
    return sent


# ---- which addresses -------------------------------------------------------------------------------------------------


class AddressBook:
    """The addresses that the SVMs of this host have used, by NIC, learnt from the flows' table bit by bit.

    A connection's entry proves an address once the SVM's own SYN or SYN-ACK was seen; the clients' half alone does not.
    """

    def __init__(self, control: Control) -> None:
        self._control = control
        self._here = 0
        self._known: dict[int, dict[Address, None]] = {}

    def addresses(self, nic: int) -> tuple[Address, ...]:
        """Of NIC number `nic`, oldest first."""
        return tuple(self._known.get(nic, ()))

    def forget(self, nic: int) -> None:
        """The guest is another one now."""
        self._known.pop(nic, None)

    def look(self, count: int) -> None:
        """Reads the next `count` flows, some 4 us each; call it now and then while the pair is in lock-step."""
        top = ct.c_uint64()
        bpfsys.lookup(self._control.fd("gauges"), ct.c_uint32(GAUGE_FLOW_TOP), top)
        for _ in range(min(count, top.value)):
            flow = self._control.shapes.leaf("flows")()
            bpfsys.lookup(self._control.fd("flows"), ct.c_uint32(self._here), flow)
            self._here = (self._here + 1) % top.value
            if flow.flags & FLOW_LIVE and flow.flags & (FLOW_SVM_ISN | FLOW_DELTA):
                self._note(flow.key)

    def _note(self, key: Any) -> None:
        packed = ipaddress.IPv6Address(bytes(key.guest))
        ip = packed.ipv4_mapped or packed
        if ip.is_multicast or ip.is_unspecified or ip.is_loopback:
            return
        known = self._known.setdefault(key.nic, {})
        if len(known) < MOST:
            known[Address(ip, tuple(_tag(tag) for tag in key.vlan if tag & TAG_PRESENT))] = None


def _tag(tag: int) -> bytes:
    return struct.pack("!HH", 0x88A8 if tag & TAG_AD else 0x8100, tag & TAG_ID)
