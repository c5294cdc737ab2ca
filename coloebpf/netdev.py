"""Devices and hooks: what attach() needs of a vif and a forward device, checked with one sentence for each thing that is wrong."""

import contextlib
import ctypes as ct
import os
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute, NetlinkError
from pyroute2 import netns as _netns

from coloebpf import bpfsys
from coloebpf.errors import ConfigError, DeviceError, HookBusyError

PREFERENCE = 0xC0  # tc preference of our filters; with the handle it makes `replace` find them again
HANDLE = 1
NAME = "coloebpf:"  # begins the name of each filter of ours
PARENTS = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}  # TC_H_MIN_INGRESS, TC_H_MIN_EGRESS of a clsact
CLSACT = 0xFFFF0000
TAGS = 8  # bytes of two VLAN tags: the guest's own and the link's
# By ethtool's names. Checksums, segmentation, merging: frames on fwd must be what a wire carries. VLAN: XDP can't see a tag that travels beside.
OFFLOADS = (
    "generic-receive-offload",
    "large-receive-offload",
    "rx-gro-hw",
    "rx-gro-list",
    "rx-udp-gro-forwarding",
    "tx-checksumming",
    "tcp-segmentation-offload",
    "generic-segmentation-offload",
    "rx-vlan-offload",
    "tx-vlan-offload",
    "rx-vlan-stag-hw-parse",
    "tx-vlan-stag-hw-insert",
)
XDP_FLAGS_SKB, XDP_FLAGS_DRV = 2, 4  # linux/if_link.h
XDP_MODES = {"native": (XDP_FLAGS_DRV,), "generic": (XDP_FLAGS_SKB,), "auto": (XDP_FLAGS_DRV, XDP_FLAGS_SKB)}


@dataclass(frozen=True)
class Device:
    """A network device of the caller's namespace."""

    name: str
    index: int
    mtu: int
    master: int | None
    up: bool
    kind: str
    xdp: int  # id of the XDP program, 0: none


class Devices:
    """Netlink for one piece of work, in the namespace that the caller is in."""

    def __init__(self) -> None:
        self._ip = IPRoute()

    def __enter__(self) -> "Devices":
        return self

    def __exit__(self, *_: object) -> None:
        self._ip.close()

    def find(self, name: str) -> Device:
        """Raises DeviceError if there is no such device."""
        found = self._ip.link_lookup(ifname=name)
        if not found:
            raise DeviceError(f"device {name} does not exist in this network namespace")
        return self._device(self._ip.get_links(found[0])[0])

    @staticmethod
    def _device(link: Any) -> Device:
        xdp = link.get_attr("IFLA_XDP")
        info = link.get_attr("IFLA_LINKINFO")
        return Device(
            name=link.get_attr("IFLA_IFNAME"),
            index=link["index"],
            mtu=link.get_attr("IFLA_MTU"),
            master=link.get_attr("IFLA_MASTER"),
            up=bool(link["flags"] & 1),
            kind=(info.get_attr("IFLA_INFO_KIND") if info else None) or "",
            xdp=(xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else None) or 0,
        )

    def check_forward(self, fwd: Device, vif: Device, mtu: int) -> None:
        """What the forward device must be. Raises DeviceError with the command that mends it."""
        if fwd.index == vif.index:
            raise DeviceError(f"{fwd.name} can't be both the guest's vif and the forward device")
        if vif.mtu > mtu:
            raise DeviceError(f"{vif.name} has MTU {vif.mtu}, the dataplane was loaded for {mtu}: load it with a larger mtu")
        if fwd.mtu < vif.mtu + TAGS:
            raise DeviceError(f"{fwd.name} has MTU {fwd.mtu}, the guest's frames with tags need {vif.mtu + TAGS}: ip link set {fwd.name} mtu {vif.mtu + TAGS}")
        if fwd.master is not None:
            raise DeviceError(f"{fwd.name} belongs to a bridge or bond: the forward link must have no other user; ip link set {fwd.name} nomaster")
        addresses = [a.get_attr("IFA_ADDRESS") for a in self._ip.get_addr(index=fwd.index)]
        foreign = [a for a in addresses if a and not a.lower().startswith("fe80:")]
        if foreign:
            raise DeviceError(f"{fwd.name} has address {foreign[0]}: the forward link must have no other user; ip addr flush dev {fwd.name}")

    def check_free(self, device: Device, side: str) -> None:
        """Raises HookBusyError if a filter that is not ours sits on the hook."""
        for name in self._filters(device, side):
            if not name.startswith(NAME):
                raise HookBusyError(
                    f"the tc {side} hook of {device.name} is held by another program ({name or 'unnamed'}): tc filter show dev {device.name} {side}"
                )

    def _filters(self, device: Device, side: str) -> list[str]:
        """Names of the hook's filters; a filter that is no bpf program goes by its kind."""
        if not self._has_clsact(device.index):
            return []
        names = []
        for message in self._ip.get_filters(index=device.index, parent=PARENTS[side]):
            options = message.get_attr("TCA_OPTIONS")
            if options is None or message["handle"] == 0:  # the head of a preference, no filter itself
                continue
            kind = message.get_attr("TCA_KIND")
            name = options.get_attr("TCA_BPF_NAME") if kind == "bpf" else None
            names.append(name or f"a {kind} filter")
        return names

    def check_xdp_free(self, device: Device, ours: str) -> None:
        """Raises HookBusyError if another XDP program than `ours` (a program's name) is attached."""
        if device.xdp and bpfsys.prog_name(device.xdp) != ours:
            raise HookBusyError(f"XDP on {device.name} is held by another program (id {device.xdp}): bpftool prog show id {device.xdp}")

    def _has_clsact(self, index: int) -> bool:
        return any(q.get_attr("TCA_KIND") == "clsact" for q in self._ip.get_qdiscs(index=index))

    def ensure_clsact(self, device: Device) -> bool:
        """True if it was not there and is ours to take away."""
        if self._has_clsact(device.index):
            return False
        try:
            self._ip.tc("add", "clsact", device.index)
        except NetlinkError as e:
            raise DeviceError(f"{device.name} takes no clsact qdisc ({e}); is an old `ingress` qdisc there? tc qdisc show dev {device.name}") from e
        return True

    def attach_tc(self, device: Device, side: str, name: str, fd: int) -> None:
        """Puts a program on a hook, in place of the one that we had there: one netlink message, no packet passes without."""
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

    def detach(self, index: int, clsact: bool, xdp: bool) -> None:
        """Takes our filters off a device; with `clsact` the qdisc too, unless somebody else uses it now. A device that is gone is no error."""
        try:
            links = self._ip.get_links(index)
        except NetlinkError:
            return
        device = self._device(links[0])
        others = False
        for side in PARENTS:
            for name in self._filters(device, side):
                if name.startswith(NAME):
                    with contextlib.suppress(NetlinkError):
                        self._ip.tc("del-filter", "bpf", index, handle=HANDLE, prio=PREFERENCE, protocol=3, parent=PARENTS[side])
                else:
                    others = True
        if clsact and not others:
            with contextlib.suppress(NetlinkError):
                self._ip.tc("del", "clsact", index)
        if xdp and device.xdp and bpfsys.prog_name(device.xdp) == "link_arrive":
            _set_xdp(device.name, -1, 0)


def _set_xdp(name: str, fd: int, flags: int) -> int:
    from bcc import lib

    return int(lib.bpf_attach_xdp(name.encode(), fd, flags))


def attach_xdp(name: str, fd: int, mode: str) -> None:
    """Attaches `fd` to `name`: native where the driver has it, generic otherwise, or as `mode` says. Raises DeviceError."""
    if mode not in XDP_MODES:
        raise ConfigError(f"xdp mode {mode!r}: must be one of {', '.join(XDP_MODES)}")
    result = 0
    for flags in XDP_MODES[mode]:
        result = _set_xdp(name, fd, flags)
        if result >= 0:
            return
    raise DeviceError(f"{name} takes no {mode} XDP program: {os.strerror(-result)}")


def offloads_off(name: str) -> None:
    """Turns off what would make frames other than a wire carries. Raises DeviceError for one that stays on."""
    for feature in OFFLOADS:  # one by one: ethtool gives up the whole line at the first that it does not know
        subprocess.run(["ethtool", "-K", name, feature, "off"], capture_output=True, check=False)
    shown = subprocess.run(["ethtool", "-k", name], capture_output=True, text=True, check=False)
    if shown.returncode:
        raise DeviceError(f"ethtool -k {name}: {shown.stderr.strip()}; is ethtool installed?")
    for line in shown.stdout.splitlines():
        feature, _, value = line.strip().partition(": ")
        if feature in OFFLOADS and value.startswith("on"):
            raise DeviceError(f"{name}: offload {feature} stays on ({value}); the forward link needs it off")


def spread_receive(name: str) -> None:
    """Receive packet steering on a vif: a flow's packets, raw and released, go through one CPU, which keeps their order (docs/design.md)."""
    cpus = os.cpu_count() or 1
    mask = f"{(1 << cpus) - 1:x}"
    with tempfile.TemporaryDirectory(prefix="coloebpf-sys-") as where:
        libc = ct.CDLL(None, use_errno=True)
        if libc.mount(b"sysfs", where.encode(), b"sysfs", 0, None):  # /sys shows the namespace that it was mounted in
            raise DeviceError(f"can't see {name} in sysfs: {os.strerror(ct.get_errno())}")
        try:
            for queue in Path(where, "class/net", name, "queues").glob("rx-*/rps_cpus"):
                queue.write_text(mask)
        except OSError as e:
            raise DeviceError(f"{name}: can't set receive packet steering: {e.strerror}; does the kernel have CONFIG_RPS?") from e
        finally:
            libc.umount2(where.encode(), 2)  # MNT_DETACH


def raise_backlog(packets: int, path: Path = Path("/proc/sys/net/core/netdev_max_backlog"), first: str = "/proc/1/ns/net") -> None:
    """Released packets pass a CPU's backlog, which drops what it has no room for: it must take a whole slab. Never lowered.
    The number is the machine's, and only its first network namespace shows it."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        with contextlib.suppress(OSError, ValueError):
            _netns.setns(first)
            if int(path.read_text()) < packets:
                path.write_text(f"{packets}\n")
    finally:
        _netns.setns(home)
        os.close(home)
