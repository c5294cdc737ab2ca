"""Taking a dataplane down, whole or not: what a crash, a reboot of half of it or an operator's rm has left of it."""

import ctypes as ct
import shutil
from collections.abc import Iterable
from pathlib import Path

from coloebpf import bpfsys, netdev, shapes
from coloebpf.errors import BpfError
from coloebpf.model import NIC_CLSACT_FWD, NIC_CLSACT_VIF


def detach(pin_dir: Path, also: Iterable[str] = ()) -> None:
    """Takes everything down in the caller's network namespace: filters, XDP, clsact that attach() made, pins.

    Repeatable, and no matter how much of it is there. `also`: names of devices to take our filters and XDP off even if
    no map tells of them; one that does not exist is passed over.
    """
    with netdev.Devices() as devices:
        for index, made_clsact in _hooked(pin_dir).items():
            devices.detach(index, made_clsact)
        for name in also:
            number = devices.index(name)
            if number is not None:
                devices.detach(number, clsact=False)
    remove_pins(pin_dir)


def remove_pins(pin_dir: Path) -> None:
    """Removes pins and shapes; nothing that runs is touched. Raises BpfError for pins that stay."""
    shutil.rmtree(pin_dir, ignore_errors=True)
    shapes.forget(pin_dir)
    if pin_dir.exists():
        raise BpfError(f"the pins at {pin_dir} can't be removed: rm -r {pin_dir}")


def _hooked(pin_dir: Path) -> dict[int, bool]:
    """Devices (ifindex) that attach() has used -> whether it made their clsact.

    The maps' keys say which devices; shapes, which a crash may have cost, are only needed for the clsact: without them
    it stays.
    """
    try:
        kinds = shapes.Shapes(pin_dir)
    except BpfError:
        kinds = None
    found: dict[int, bool] = {}
    if (pin_dir / "links").exists():
        with bpfsys.opened(pin_dir / "links") as fd:
            for link in bpfsys.keys(fd, ct.c_uint32 * 2):  # struct link_key: fwd, VLAN id
                found[link[0]] = False
    if (pin_dir / "nics").exists():
        with bpfsys.opened(pin_dir / "nics") as fd:
            for vif in bpfsys.keys(fd, ct.c_uint32):
                found.setdefault(vif.value, False)
                nic = kinds.leaf("nics")() if kinds else None
                if nic is not None and bpfsys.lookup(fd, vif, nic):
                    for index, flag in ((nic.vif, NIC_CLSACT_VIF), (nic.fwd, NIC_CLSACT_FWD)):
                        found[index] = found.get(index, False) or bool(nic.flags & flag)
    return found
