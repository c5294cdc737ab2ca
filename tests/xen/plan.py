"""Names, addresses and files of a Xen lab."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coloebpf.lab import image

CACHE = image.CACHE / "xen"
HOSTS = (1, 2)
CLIENT = "client"
# Each is a bridge in the lab's namespace with one tap per host. FORWARD is the dataplane's, which wants a link without
# addresses; over DIRECT guests' memory is copied.
MANAGEMENT, FORWARD, DIRECT, LAN = "mgmt", "fwd", "peer", "lan"
WIRES = (MANAGEMENT, FORWARD, DIRECT, LAN)
DIRECT_LINKS = (FORWARD, DIRECT)
SUBNETS = {MANAGEMENT: "10.78.0", DIRECT: "10.79.0", LAN: "10.77.0"}
LAN_SUBNETS = (SUBNETS[LAN], "10.77.1")  # for each NIC of a guest one
SUBNETS_V6 = {LAN: "fd77::"}
CLIENT_END = 254  # last byte of the addresses that the lab itself has, on management and LAN
DIRECT_MTU = 9000  # a forward device needs 8 bytes more than the guest's; a plain copy of memory likes big frames


@dataclass(frozen=True)
class XenPlan:
    """A lab by its name."""

    name: str = "xenlab"

    @property
    def directory(self) -> Path:
        """Disks, consoles and sockets of the running hosts: on a disk, since a dom0 writes a lot."""
        return CACHE / f"lab-{self.name}"

    def home(self, host: int) -> Path:
        """Of one host."""
        return self.directory / f"host{host}"

    def address(self, wire: str, host: int) -> str:
        """A host's on a wire that has addresses."""
        return f"{SUBNETS[wire]}.{host}"

    def mac(self, wire: str, host: int) -> str:
        """Locally administered; dom0_init.sh tells the wires apart by the fifth byte."""
        return f"52:54:00:c0:{WIRES.index(wire):02x}:{host:02x}"

    @staticmethod
    def tap(wire: str, host: int) -> str:
        """The device in the lab's namespace that a host's NIC is plugged into: taken down, the cable is cut."""
        return f"{wire}{host}"

    def machine(self, host: int) -> str:
        """What its process is known by."""
        return f"coloebpf-{self.name}-host{host}"
