"""What a lab consists of: names, devices, addresses and paths. Nothing here touches the system."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from coloebpf.errors import LabError

RUN_ROOT = Path("/run/coloebpf/lab")
PIN_ROOT = Path("/sys/fs/bpf/coloebpf/lab")

ARBITER = "arbiter"  # the switch of the management network, and the machine on it that has the last word
NODES = ("client", "lan", "primary", "secondary", "pvm", "svm", ARBITER)
HOSTS = ("primary", "secondary")
GUESTS = ("pvm", "svm")
MODES = ("none", "process", "qemu")  # what the guests are
# Where `lab exec` goes: the lan is a switch, nothing runs on it.
EXEC_NODES = tuple(node for node in NODES if node != "lan")

PAIR = 0  # the lab has one guest, so one pair, whatever the number of its NICs
MAX_NICS = 64  # the dataplane's limit of NICs on a host
MTUS = (1500, 9000)
MGMT = "mgmt0"  # the services' own network, as NICs of its own would be on real hosts
MANAGEMENT = {"primary": "192.0.2.1", "secondary": "192.0.2.2", ARBITER: "192.0.2.3"}  # RFC 5737
ARBITERS = ("command", "etcd", "none")  # command: the lab's own power switch
FIRST_VLAN = 100  # VLAN id of NIC 0 on a shared forward link
FWD_HEADROOM = 8  # bytes above the guest's MTU: coloebpf's own tag and one of the guest's
NAME_LENGTH = 32
VIF_MAC = "fe:ff:ff:ff:ff:ff"  # as Xen's hotplug scripts do, so that no bridge takes its address from a vif

_NAME = re.compile(r"[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class End:
    """One device: a node, the device's name there, and its MAC."""

    node: str
    device: str
    mac: str


@dataclass(frozen=True)
class Link:
    """A veth pair."""

    one: End
    other: End
    mtu: int


@dataclass(frozen=True)
class Nic:
    """One NIC of the guest, with the device that it is on each host and the addresses of its subnet.

    `standby_vif`: the other one that a guest of virtual machines takes in turn; "" for other guests.
    """

    nic: int
    guest_device: str
    mac: str
    vif: str
    standby_vif: str
    fwd: str
    vlan: int
    client_v4: str
    client_v6: str
    guest_v4: str
    guest_v6: str


@dataclass(frozen=True)
class LabPlan:
    """A lab as it was asked for; everything else follows from it.

    `service`: each host runs coloebpf's service; without it a small agent drains the events, and nobody decides.
    `arbiter`, `peer_timeout_ms`: of the services' configuration.
    """

    name: str = "lab"
    guests: str = "none"
    nics: int = 1
    vlan: bool = False
    mtu: int = 1500
    command: tuple[str, ...] = ()
    service: bool = False
    arbiter: str = "command"
    peer_timeout_ms: int = 200
    run_root: Path = field(default=RUN_ROOT, repr=False)
    pin_root: Path = field(default=PIN_ROOT, repr=False)

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.guests not in MODES:
            raise LabError(f"guests are one of {', '.join(MODES)}, not {self.guests!r}")
        if self.command and self.guests != "process":
            raise LabError(f"guests of {self.guests!r} run no command; use --guests process")
        if self.virtual and not self.service:
            raise LabError("virtual machines are protected by services; --bare is for other guests")
        if not 1 <= self.nics <= MAX_NICS:
            raise LabError(f"a lab's guest has 1 to {MAX_NICS} NICs, not {self.nics}")
        if self.arbiter not in ARBITERS:
            raise LabError(f"the lab's arbiter is one of {', '.join(ARBITERS)}, not {self.arbiter!r}")
        if self.mtu not in MTUS:
            raise LabError(f"the MTU is one of {MTUS}, not {self.mtu}")

    @property
    def talks(self) -> bool:
        """Whether client and guests have addresses and a stack that answers."""
        return self.guests != "none"

    @property
    def virtual(self) -> bool:
        """Whether the guests are virtual machines, which live in their hosts' namespaces, on taps."""
        return self.guests == "qemu"

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that have a namespace."""
        return tuple(node for node in NODES if not (self.virtual and node in GUESTS))

    @property
    def run_dir(self) -> Path:
        return self.run_root / self.name

    @property
    def pin_base(self) -> Path:
        return self.pin_root / self.name

    def pin_dir(self, host: str) -> Path:
        return self.pin_base / host

    def namespace(self, node: str) -> str:
        return f"colo-{self.name}-{node}"

    def nic_list(self) -> list[Nic]:
        return [self._nic(number) for number in range(self.nics)]

    def _nic(self, number: int) -> Nic:
        v6 = f"fd77:0:0:{number:x}" if number else "fd77"
        return Nic(
            nic=number,
            guest_device=f"eth{number}",
            mac=f"02:c0:10:00:00:{number:02x}",
            vif=f"vif1.{number}",
            standby_vif=f"vif2.{number}" if self.virtual else "",
            fwd="fwd0" if self.vlan else f"fwd{number}",
            vlan=FIRST_VLAN + number if self.vlan else 0,
            client_v4=f"10.77.{number}.1",
            client_v6=f"{v6}::1",
            guest_v4=f"10.77.{number}.10",
            guest_v6=f"{v6}::10",
        )

    def client(self) -> End:
        return End("client", "eth0", "02:c0:10:01:00:01")

    def bridges(self) -> list[End]:
        """The switches, and each host's bridge; all are called br0."""
        bridges = [
            End("lan", "br0", "02:c0:10:02:00:00"),
            End("primary", "br0", "02:c0:10:02:01:00"),
            End("secondary", "br0", "02:c0:10:02:02:00"),
        ]
        return [*bridges, End(ARBITER, "br0", "02:c0:10:04:00:00")] if self.service else bridges

    def bridge_ports(self) -> list[tuple[str, str]]:
        """(node, device) of every port of a bridge."""
        ports = [("lan", node) for node in ("client", *HOSTS)]
        for host in HOSTS:
            ports += [(host, "eth0"), *((host, nic.vif) for nic in self.nic_list() if not self.virtual)]
        ports += [(tap.node, tap.device) for tap in self.taps()]
        return [*ports, *((ARBITER, host) for host in HOSTS)] if self.service else ports

    def links(self) -> list[Link]:
        """Every veth pair: to the switch, from hosts to guests, and the forward links."""
        lan = [
            Link(self.client(), End("lan", "client", "02:c0:10:02:00:01"), self.mtu),
            Link(End("primary", "eth0", "02:c0:10:02:01:01"), End("lan", "primary", "02:c0:10:02:00:02"), self.mtu),
            Link(End("secondary", "eth0", "02:c0:10:02:02:01"), End("lan", "secondary", "02:c0:10:02:00:03"), self.mtu),
        ]
        vifs = [
            Link(End(host, nic.vif, VIF_MAC), End(guest, nic.guest_device, nic.mac), self.mtu)
            for host, guest in zip(HOSTS, GUESTS, strict=True)
            for nic in self.nic_list()
            if not self.virtual
        ]
        return lan + vifs + self._management() + self._forward_links()

    def taps(self) -> list[End]:
        """The hosts' devices of virtual machines, two for each NIC."""
        if not self.virtual:
            return []
        vifs = [vif for nic in self.nic_list() for vif in (nic.vif, nic.standby_vif)]
        return [End(host, vif, VIF_MAC) for host in HOSTS for vif in vifs]

    def _management(self) -> list[Link]:
        if not self.service:
            return []
        return [
            Link(End(host, MGMT, f"02:c0:10:04:0{number}:00"), End(ARBITER, host, f"02:c0:10:04:0{number}:01"), MTUS[0])
            for number, host in enumerate(HOSTS, 1)
        ]

    def _forward_links(self) -> list[Link]:
        links = []
        for number, fwd in enumerate(dict.fromkeys(nic.fwd for nic in self.nic_list())):
            primary = End("primary", fwd, f"02:c0:10:03:01:{number:02x}")
            secondary = End("secondary", fwd, f"02:c0:10:03:02:{number:02x}")
            mtu = self.mtu + FWD_HEADROOM
            if not self.wires():
                links.append(Link(primary, secondary, mtu))
                continue
            links.append(Link(primary, End("lan", f"wp{number}", f"02:c0:10:03:03:{number:02x}"), mtu))
            links.append(Link(secondary, End("lan", f"ws{number}", f"02:c0:10:03:04:{number:02x}"), mtu))
        return links

    def wires(self) -> list[tuple[End, list[str]]]:
        """Bridges that forward links go through, with their ports.

        A veth takes no native XDP for jumbo frames, and generic XDP ignores frames that a BPF program redirected; the
        mark of that survives a veth, as no wire would let it. A bridge in between clears it.
        """
        if self.mtu <= 1500:
            return []
        fwds = dict.fromkeys(nic.fwd for nic in self.nic_list())
        return [(End("lan", f"wire{n}", f"02:c0:10:03:05:{n:02x}"), [f"wp{n}", f"ws{n}"]) for n in range(len(fwds))]

    def devices(self, node: str) -> list[str]:
        """The names of the lab's devices on `node`; a kernel may put tunnel devices of its own beside them."""
        ends = [end for link in self.links() for end in (link.one, link.other)]
        bridges = (*self.bridges(), *(wire for wire, _ in self.wires()))
        return [end.device for end in (*bridges, *ends, *self.taps()) if end.node == node]


def check_name(name: str) -> str:
    """`name` if it can be part of a namespace's and a directory's name."""
    if not _NAME.fullmatch(name) or len(name) > NAME_LENGTH:
        raise LabError(f"a lab's name is of a-z, 0-9 and '-', at most {NAME_LENGTH} characters; {name!r} isn't")
    return name
