"""Frames of one conversation between the guest and a client, built with scapy."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scapy.layers.inet import IP, TCP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

if TYPE_CHECKING:
    from tests.lab.wire import Wire

M32 = 0xFFFFFFFF
# Kinds of frames that each rule is tried with: arguments of Talk.
KINDS: dict[str, dict[str, Any]] = {
    "v4": {},
    "v6": {"family": 6},
    "v4-q": {"tags": [("q", 7)]},
    "v6-ad-q": {"family": 6, "tags": [("ad", 9), ("q", 4094)]},
}

_ports = itertools.count(2000)


def next_port() -> int:
    """A guest's port that no other case of this process has: flows of different cases never meet."""
    return 1024 + next(_ports) % 60_000


@dataclass
class Talk:
    """One conversation between the guest and a client, with a port of its own; builds both directions' frames."""

    wire: Wire
    family: int = 4
    tags: Sequence[tuple[str, int]] = ()  # ("q" or "ad", id), outer first
    nic: int = 0
    guest_port: int = field(default_factory=next_port)
    client_port: int = 40_000
    extensions: Sequence[Packet] = ()  # IPv6 extension headers between IP and the rest
    ip_options: bytes = b""

    def link(self, source: str, target: str) -> Packet:
        frame = Ether(src=source, dst=target)
        for kind, number in self.tags:
            frame = frame / (Dot1Q(vlan=number) if kind == "q" else Dot1AD(vlan=number))
        return frame

    def ip(self, output: bool = True, **fields: Any) -> Packet:
        """Ethernet and IP header, of the guest's output or of the client's."""
        nic = self.wire.nics[self.nic]
        macs = (nic.mac, self.wire.client_mac)
        frame = self.link(*(macs if output else macs[::-1]))
        if self.family == 4:
            ends = (nic.guest_v4, nic.client_v4)
            source, target = ends if output else ends[::-1]
            header = IP(src=source, dst=target, **fields)
            if self.ip_options:
                header.options = [Raw(self.ip_options)]
            return frame / header
        ends = (nic.guest_v6, nic.client_v6)
        source, target = ends if output else ends[::-1]
        names = {"ttl": "hlim", "tos": "tc"}
        frame = frame / IPv6(src=source, dst=target, **{names.get(k, k): v for k, v in fields.items() if k != "id"})
        for extension in self.extensions:
            frame = frame / extension.copy()
        return frame

    def tcp(
        self,
        seq: int,
        data: bytes = b"",
        flags: str = "A",
        ack: int = 1000,
        window: int = 500,
        options: Sequence[Any] = (),
        output: bool = True,
        ip: dict[str, Any] | None = None,
        **fields: Any,
    ) -> bytes:
        ports = (self.guest_port, self.client_port)
        sport, dport = ports if output else ports[::-1]
        header = TCP(
            sport=sport,
            dport=dport,
            seq=seq & M32,
            ack=ack & M32,
            flags=flags,
            window=window,
            options=list(options),
            **fields,
        )
        return bytes(self.ip(output, **(ip or {})) / header / Raw(data))

    def udp(self, data: bytes, output: bool = True, ip: dict[str, Any] | None = None, **fields: Any) -> bytes:
        ports = (self.guest_port, self.client_port)
        sport, dport = ports if output else ports[::-1]
        return bytes(self.ip(output, **(ip or {})) / UDP(sport=sport, dport=dport, **fields) / Raw(data))

    def raw(self, proto: int, data: bytes, **fields: Any) -> bytes:
        """Any other protocol on IP."""
        frame = self.ip(**fields)
        if self.family == 4:
            frame[IP].proto = proto
        elif self.extensions:
            frame.lastlayer().nh = proto
        else:
            frame[IPv6].nh = proto
        return bytes(frame / Raw(data))

    def client_tcp(self, seq: int, data: bytes = b"", **fields: Any) -> bytes:
        return self.tcp(seq, data, output=False, **fields)
