"""Devices and hooks: what attach() needs of a vif and a forward device, with one sentence for each wrong thing."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from pyroute2 import IPRoute, NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import IFF_PROMISC

from coloebpf import bpfsys
from coloebpf.errors import ConfigError, DeviceError, HookBusyError

PREFERENCE = 0xC0  # tc preference of our filters; with the handle it makes `replace` find them again
HANDLE = 1
NAME = "coloebpf:"  # begins the name of each filter of ours
XDP_PROGRAM = "link_arrive"  # the kernel keeps no other name for an XDP program than its own
PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}  # TC_H_MIN_INGRESS, TC_H_MIN_EGRESS of a clsact
TAGS = 8  # bytes of two VLAN tags: the guest's own and the link's

XDP_FLAGS_SKB, XDP_FLAGS_DRV, XDP_FLAGS_HW = 2, 4, 8  # linux/if_link.h
XDP_MODES = {"native": (XDP_FLAGS_DRV,), "generic": (XDP_FLAGS_SKB,), "auto": (XDP_FLAGS_DRV, XDP_FLAGS_SKB)}
XDP_IDS = {
    XDP_FLAGS_SKB: "IFLA_XDP_SKB_PROG_ID",
    XDP_FLAGS_DRV: "IFLA_XDP_DRV_PROG_ID",
    XDP_FLAGS_HW: "IFLA_XDP_HW_PROG_ID",
}


@dataclass(frozen=True)
class Device:
    """A network device of the caller's namespace."""

    name: str
    index: int
    mtu: int
    master: int | None
    hears_all: bool  # it is promiscuous because somebody said so
    xdp: dict[int, int]  # XDP_FLAGS_* of a mode -> id of the program attached in it


class Devices:
    """Netlink for one piece of work, in the namespace that the caller is in."""

    def __init__(self) -> None:
        self._ip = IPRoute()

    def __enter__(self) -> Devices:
        return self

    def __exit__(self, *_: object) -> None:
        self._ip.close()

    # ---- looking ---------------------------------------------------------------------------------------------------

    def find(self, name: str) -> Device:
        """Raises DeviceError if there is no such device."""
        index = self.index(name)
        if index is None:
            raise DeviceError(f"device {name} does not exist in this network namespace")
        return self._device(self._ip.get_links(index)[0])

    def index(self, name: str) -> int | None:
        """The device's number, if there is one of that name."""
        found = self._ip.link_lookup(ifname=name)
        return int(found[0]) if found else None

    @staticmethod
    def _device(link: Any) -> Device:
        xdp = link.get_attr("IFLA_XDP")
        ids = {flags: xdp.get_attr(attribute) for flags, attribute in XDP_IDS.items()} if xdp else {}
        return Device(
            name=link.get_attr("IFLA_IFNAME"),
            index=link["index"],
            mtu=link.get_attr("IFLA_MTU"),
            master=link.get_attr("IFLA_MASTER"),
            hears_all=bool(link["flags"] & IFF_PROMISC),
            xdp={flags: number for flags, number in ids.items() if number},
        )

    def check_forward(self, fwd: Device, vif: Device, mtu: int) -> None:
        """What the forward device must be. Raises DeviceError with the command that mends it."""
        alone = "the forward link must have no other user"
        if fwd.index == vif.index:
            raise DeviceError(f"{fwd.name} can't be both the guest's vif and the forward device")
        if vif.mtu > mtu:
            raise DeviceError(
                f"{vif.name} has MTU {vif.mtu}, the dataplane was loaded for {mtu}: load it with a larger mtu"
            )
        if fwd.mtu < vif.mtu + TAGS:
            raise DeviceError(
                f"{fwd.name} has MTU {fwd.mtu}, the guest's frames with tags need {vif.mtu + TAGS}: "
                f"ip link set {fwd.name} mtu {vif.mtu + TAGS}"
            )
        if fwd.master is not None:
            raise DeviceError(f"{fwd.name} belongs to a bridge or bond: {alone}; ip link set {fwd.name} nomaster")
        addresses = [a.get_attr("IFA_ADDRESS") for a in self._ip.get_addr(index=fwd.index)]
        foreign = [a for a in addresses if a and not a.lower().startswith("fe80:")]
        if foreign:
            raise DeviceError(f"{fwd.name} has address {foreign[0]}: {alone}; ip addr flush dev {fwd.name}")

    def check_free(self, device: Device, side: str) -> bool:
        """True if a filter of ours is on the hook. Raises HookBusyError if another one is."""
        names = self._filters(device.index, side)
        for name in names:
            if not name.startswith(NAME):
                raise HookBusyError(
                    f"the tc {side} hook of {device.name} is held by another program ({name}): "
                    f"tc filter show dev {device.name} {side}"
                )
        return bool(names)

    def check_xdp_free(self, device: Device) -> bool:
        """True if our XDP program is attached. Raises HookBusyError if another one is."""
        for number in device.xdp.values():
            if bpfsys.prog_name(number) != XDP_PROGRAM:
                raise HookBusyError(
                    f"XDP on {device.name} is held by another program (id {number}): bpftool prog show id {number}"
                )
        return bool(device.xdp)

    def _filters(self, index: int, side: str) -> list[str]:
        """Names of the hook's filters; a filter that is no bpf program goes by its kind."""
        if not self._has_clsact(index):
            return []
        names = []
        for message in self._ip.get_filters(index=index, parent=PARENTS[side]):
            options = message.get_attr("TCA_OPTIONS")
            if options is None or message["handle"] == 0:  # the head of a preference, no filter itself
                continue
            kind = message.get_attr("TCA_KIND")
            name = options.get_attr("TCA_BPF_NAME") if kind == "bpf" else None
            names.append(name or f"a {kind} filter")
        return names

    def _has_clsact(self, index: int) -> bool:
        return any(q.get_attr("TCA_KIND") == "clsact" for q in self._ip.get_qdiscs(index=index))

    # ---- adding ----------------------------------------------------------------------------------------------------

    def ensure_clsact(self, device: Device) -> bool:
        """True if it was not there and is ours to take away."""
        if self._has_clsact(device.index):
            return False
        try:
            self._ip.tc("add", "clsact", device.index)
        except NetlinkError as e:
            raise DeviceError(
                f"{device.name} takes no clsact qdisc ({os.strerror(e.code)}); is an old `ingress` qdisc there? "
                f"tc qdisc show dev {device.name}"
            ) from e
        return True

    def attach_tc(self, device: Device, side: str, name: str, fd: int) -> None:
        """Puts a program on a hook, in place of ours that was there: one netlink message, no packet passes without."""
        try:
            self._ip.tc(
                "replace-filter",
                "bpf",
                device.index,
                handle=HANDLE,
                prio=PREFERENCE,
                protocol=3,  # ETH_P_ALL
                parent=PARENTS[side],
                fd=fd,
                name=NAME + name,
                direct_action=True,
            )
        except NetlinkError as e:
            raise DeviceError(f"{device.name} takes no {name} at tc {side}: {os.strerror(e.code)}") from e

    def attach_xdp(self, device: Device, fd: int, mode: str) -> None:
        """Attaches `fd`: native where the driver has it, generic otherwise, or as `mode` says. Raises DeviceError."""
        if mode not in XDP_MODES:
            raise ConfigError(f"xdp mode {mode!r}: must be one of {', '.join(XDP_MODES)}")
        refused = []
        for flags in XDP_MODES[mode]:
            try:
                self._set_xdp(device.index, fd, flags)
                return
            except NetlinkError as e:
                refused.append(os.strerror(e.code))
        raise DeviceError(f"{device.name} takes no XDP program (mode {mode}): {', then '.join(refused)}")

    def hear_all(self, device: Device) -> None:
        """Frames on the forward link have clients' and guests' addresses: a NIC keeps those from its host otherwise."""
        self._ip.link("set", index=device.index, flags=IFF_PROMISC, mask=IFF_PROMISC)

    def _set_xdp(self, index: int, fd: int, flags: int) -> None:
        self._ip.link("set", index=index, xdp={"attrs": [("IFLA_XDP_FD", fd), ("IFLA_XDP_FLAGS", flags)]})

    # ---- taking away: what is gone already is no error ---------------------------------------------------------------

    def remove_tc(self, index: int, side: str) -> None:
        """Takes our filter off a hook."""
        with contextlib.suppress(NetlinkError):
            self._ip.tc("del-filter", "bpf", index, handle=HANDLE, prio=PREFERENCE, protocol=3, parent=PARENTS[side])

    def remove_clsact(self, index: int) -> None:
        """Takes the qdisc off a device, unless filters are still there: then somebody else uses it now."""
        with contextlib.suppress(NetlinkError):
            if not any(self._filters(index, side) for side in PARENTS):
                self._ip.tc("del", "clsact", index)

    def remove_xdp(self, index: int) -> None:
        """Takes our XDP program off a device."""
        with contextlib.suppress(NetlinkError):
            for flags, number in self._device(self._ip.get_links(index)[0]).xdp.items():
                if bpfsys.prog_name(number) == XDP_PROGRAM:
                    self._set_xdp(index, -1, flags)  # without the mode the kernel takes the driver's for meant

    def detach(self, index: int, clsact: bool) -> None:
        """Takes all that is ours off a device, found by name; with `clsact` the qdisc too."""
        with contextlib.suppress(NetlinkError):
            for side in PARENTS:
                if any(name.startswith(NAME) for name in self._filters(index, side)):
                    self.remove_tc(index, side)
            if clsact:
                self.remove_clsact(index)
            self.remove_xdp(index)
