"""The lab's network on this machine: one namespace with a bridge per wire; it is the client of the guests too."""

from __future__ import annotations

import subprocess
from contextlib import suppress

from pyroute2 import netns

from coloebpf.errors import LabError
from tests.xen.plan import (
    CLIENT_END,
    DIRECT_LINKS,
    DIRECT_MTU,
    HOSTS,
    LAN,
    LAN_SUBNETS,
    MANAGEMENT,
    SUBNETS,
    SUBNETS_V6,
    WIRES,
    XenPlan,
)


def lay(plan: XenPlan) -> None:
    """Namespace, bridges, taps."""
    netns.create(plan.name)
    lines = ["link set lo up"]
    for wire in WIRES:
        mtu = f" mtu {DIRECT_MTU}" if wire in DIRECT_LINKS else ""
        lines.append(f"link add {wire}{mtu} type bridge forward_delay 0 mcast_snooping 0")
        for host in HOSTS:
            tap = plan.tap(wire, host)
            lines.append(f"tuntap add dev {tap} mode tap")
            lines.append(f"link set {tap}{mtu} master {wire} up")
        lines.append(f"link set {wire} up")
    lines += [f"addr add {SUBNETS[wire]}.{CLIENT_END}/24 dev {wire}" for wire in (MANAGEMENT, LAN)]
    lines += [f"addr add {subnet}.{CLIENT_END}/24 dev {LAN}" for subnet in LAN_SUBNETS[1:]]
    lines.append(f"addr add {SUBNETS_V6[LAN]}{CLIENT_END}/64 dev {LAN} nodad")
    done = subprocess.run(
        ["ip", "-netns", plan.name, "-batch", "-"], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise LabError(f"the lab's wires can't be laid: {done.stderr.strip()}")


def take_up(plan: XenPlan) -> None:
    """Nothing of it is left; that it was there doesn't matter."""
    with suppress(FileNotFoundError):
        netns.remove(plan.name)
