"""Guests of the lab: one initramfs for all of them, and a configuration for xl per kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coloebpf.lab import image
from tests.xen.cache import Cache
from tests.xen.modules import load_order
from tests.xen.plan import LAN, LAN_SUBNETS, SUBNETS_V6

ARCHIVE = "guest.cpio"
DRIVERS = ("xen-netfront", "xen-blkfront", "e1000", "ata_piix", "sd_mod")
MEMORY_MIB = 160
BRIDGE = "xenbr0"
MTU = 1500

KINDS = {"pv": 11, "pvh": 12, "hvm": 13}  # kind -> the last byte of its address, if nothing else is said
# A guest of kind HVM keeps its emulated NIC: PV drivers reconnect in a copy and can't be in lock-step.
HVM = """\
type = "hvm"
xen_platform_pci = 0
serial = "pty"
nographic = 1
vga = "none"
usb = 0
acpi = 1
tsc_mode = "native"
"""


def archive(cache: Cache, kernel: image.Kernel) -> Path:
    """The initramfs: busybox, redis and dropbear of coloebpf's own lab, with the drivers that Xen's guests need."""
    files = image.guest_files(image.modules(kernel, load_order(kernel, DRIVERS)))
    inputs = [part for name, path in sorted(files.items()) for part in (name, path)]
    return cache.step("guest", inputs, lambda draft: image.pack(files, draft / ARCHIVE)) / ARCHIVE


@dataclass(frozen=True)
class Guest:
    """One guest; `number` makes addresses that no other guest has. Each of its NICs is in a subnet of the LAN's own."""

    name: str
    kind: str
    number: int
    memory: int = MEMORY_MIB
    nics: int = 1

    @property
    def addresses(self) -> list[str]:
        return [f"{subnet}.{self.number}" for subnet in LAN_SUBNETS[: self.nics]]

    @property
    def address(self) -> str:
        return self.addresses[0]

    @property
    def macs(self) -> list[str]:
        return [f"00:16:3e:00:{nic:02x}:{self.number:02x}" for nic in range(self.nics)]

    @property
    def mac(self) -> str:
        return self.macs[0]

    @property
    def ports(self) -> list[str]:
        """What its NICs are behind, where it is protected."""
        return [f"{self.name}{2 * nic}" for nic in range(self.nics)]

    def vif(self, domid: int) -> str:
        """The device in dom0 that carries the guest's frames."""
        return f"vif{domid}.0-emu" if self.kind == "hvm" else f"vif{domid}.0"

    def config(self, ports: Sequence[str] = (), disk: str = "") -> str:
        """For `xl create`. `ports`: what its NICs are behind; none: they are in the LAN's bridge. `disk`: xl's line of
        the one that the guest writes to."""
        console = "ttyS0" if self.kind == "hvm" else "hvc0"
        first, *more = (f"{address}/24" for address in self.addresses)
        nics = ";".join([f"{first},{SUBNETS_V6[LAN]}{self.number}/64", *more])
        line = f"console={console} quiet panic=-1 mitigations=off COLO_MTU={MTU} COLO_NICS={nics}"
        bridges = [f"{port}-x,script=vif-coloebpf" for port in ports] or [BRIDGE] * self.nics
        kind = ",type=ioemu,model=e1000" if self.kind == "hvm" else ""
        vifs = ", ".join(f'"mac={mac},bridge={bridge}{kind}"' for mac, bridge in zip(self.macs, bridges, strict=True))
        if disk:
            line += " COLO_DISK=sda"
        if self.kind == "hvm":
            line += " xen_nopv xen_emul_unplug=never"
        return (
            f'name = "{self.name}"\nkernel = "/lab/vmlinuz"\nramdisk = "/lab/{ARCHIVE}"\n'
            f'{"cmdline" if self.kind == "hvm" else "extra"} = "{line}"\n'
            f'memory = {self.memory}\nvcpus = 1\nvif = [{vifs}]\non_crash = "destroy"\n'
            + (f'disk = ["{disk}"]\n' if disk else "")
            + {"pv": "", "pvh": 'type = "pvh"\n', "hvm": HVM}[self.kind]
        )
