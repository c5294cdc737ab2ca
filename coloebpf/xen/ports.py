"""Ports: what a guest's NIC on Xen is behind, whatever number its domain has.

A port is a veth pair. The guest's end (`port_of`) is joined to QEMU's tap by Xen's hotplug script (deploy/xen) as the
tap appears; the other one, named in the configuration as `vif` or `standby_vif`, is in the bridge and has the hooks of
the dataplane. So these are there before the first tap, and outlive the last one. Frames for a copy whose tap is not
there yet wait in the port: sch_plug keeps them in order.
"""

from __future__ import annotations

import os
from pathlib import Path

from pyroute2 import IPRoute, NetlinkError

from coloebpf.errors import DeviceError
from coloebpf.netdev import Devices
from coloebpf.xen.guest import port_of

PLUG_BYTES = 32 << 20  # that wait for a copy: 0.25 s of 1 Gbit/s, some minutes of what TCP sends without an answer
_HANDLE = 0xC0 << 16  # of the qdisc that keeps them
_SYSCTL = Path("/proc/sys/net/ipv6/conf")


def ensure(vif: str, bridge: str, mtu: int) -> None:
    """The port is there, up, and in the bridge. Raises DeviceError."""
    port = port_of(vif)
    with Devices() as devices, IPRoute() as ip:
        master = devices.find(bridge)
        mtu = min(mtu, master.mtu)
        try:
            if devices.index(vif) is None:
                ip.link("add", ifname=vif, kind="veth", peer={"ifname": port})
            if devices.index(port) is None:
                raise DeviceError(f"{vif} is there and no port: take it away, the service makes its own")
            for name in (vif, port):
                quiet = _SYSCTL / name / "disable_ipv6"  # it has no addresses, and says nothing itself
                if quiet.exists():
                    quiet.write_text("1")
                ip.link("set", index=devices.find(name).index, mtu=mtu, state="up")
            here = devices.find(vif)
            if here.master != master.index:
                ip.link("set", index=here.index, master=master.index)
        except NetlinkError as e:
            raise DeviceError(f"port {vif} can't be made: {os.strerror(e.code)}") from e
        except OSError as e:
            raise DeviceError(f"port {vif} can't be set up: {e.strerror}") from e


def remove(vif: str) -> None:
    """The port is gone; no guest's tap may be joined to it any more."""
    with Devices() as devices, IPRoute() as ip:
        if (index := devices.index(vif)) is not None and devices.index(port_of(vif)) is not None:
            ip.link("del", index=index)


def hold(vif: str) -> None:
    """From here on frames for the guest behind it wait. Raises DeviceError."""
    _plug(vif, "replace", limit=PLUG_BYTES)


def release(vif: str) -> None:
    """What waits goes to the guest, and what comes passes. Raises DeviceError if nothing was held."""
    _plug(vif, "change", action="TCQ_PLUG_RELEASE_INDEFINITE")


def _plug(vif: str, command: str, **options: object) -> None:
    with Devices() as devices, IPRoute() as ip:
        try:
            ip.tc(command, "plug", devices.find(vif).index, handle=_HANDLE, **options)
        except NetlinkError as e:
            raise DeviceError(f"{vif} can't keep frames ({os.strerror(e.code)}): modprobe sch_plug") from e
