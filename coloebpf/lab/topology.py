"""Makes a lab's namespaces and devices, and removes them. The dataplane is not known here."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pyroute2 import IPRoute
from pyroute2 import netns as namespaces
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.rtnl.ifinfmsg import IFF_NOARP, IFF_PROMISC, IFF_UP

from coloebpf.errors import LabError
from coloebpf.lab.plan import ARBITER, GUESTS, HOSTS, MANAGEMENT, MGMT, NODES, End, LabPlan
from coloebpf.netns import inside

NETNS_DIR = Path("/run/netns")
UP_TIMEOUT = 5.0  # seconds for all devices to report that they are up; it takes milliseconds
FORWARD_QUEUE = 20_000  # frames that a forward device holds back before it drops
NUD_PERMANENT = 0x80
IFA_F_NODAD = 0x02

# Nothing but the guests and the client says a word: no address of its own on any host device (so no DAD, router
# solicitation or MLD), and the bridge's netfilter hook off, which would drop frames with a malformed IP header.
SILENT = {
    "ipv6/conf/all/disable_ipv6": "1",
    "ipv6/conf/default/disable_ipv6": "1",
    "bridge/bridge-nf-call-iptables": "0",
    "bridge/bridge-nf-call-ip6tables": "0",
    "bridge/bridge-nf-call-arptables": "0",
}
# Client and process guests: one stack on several subnets of one wire answers ARP only on the right device.
TALKING = {
    "ipv4/conf/all/arp_ignore": "1",
    "ipv4/conf/all/arp_announce": "2",
    "ipv6/conf/default/accept_ra": "0",
    "ipv6/conf/default/router_solicitations": "0",
    "ipv6/conf/default/accept_dad": "0",
    "ipv6/conf/default/dad_transmits": "0",
}


@contextmanager
def netlink(namespace: str) -> Iterator[Any]:
    """A route socket of `namespace`. Opened by this thread inside it: pyroute2's own way leaves helper processes."""
    with inside(namespace), IPRoute() as route:
        try:
            yield route
        except NetlinkError as error:
            raise LabError(f"the kernel refused a change in {namespace}: {error}") from error


def build(plan: LabPlan) -> None:
    """Make everything, up and joined, but leave the guests' own ends down (see wake_guests)."""
    for node in plan.nodes:
        namespaces.create(plan.namespace(node))
        with netlink(plan.namespace(node)) as route:
            _sysctl(TALKING if plan.talks and node in ("client", *GUESTS) else SILENT)
            route.link("set", index=1, state="up")
    for bridge in [*plan.bridges(), *(wire for wire, _ in plan.wires())]:
        _add_bridge(plan, bridge)
    for link in plan.links():
        _add_veth(plan, link.one, link.other, link.mtu)
    for tap in plan.taps():
        _add_tap(plan, tap)
    for host in HOSTS:
        with netlink(plan.namespace(host)) as route:
            for device in {nic.fwd for nic in plan.nic_list()}:
                # A veth's receive ring for XDP has 256 frames, which a burst of super-packets overflows where a NIC
                # would not: behind a queue it pushes back instead of dropping (kernel 6.16 and newer).
                route.tc("add", "pfifo", _index(route, device), limit=FORWARD_QUEUE)
    for node, port in plan.bridge_ports():
        with netlink(plan.namespace(node)) as route:
            route.link("set", index=_index(route, port), master=_index(route, "br0"))
    for wire, ports in plan.wires():
        with netlink(plan.namespace(wire.node)) as route:
            for port in ports:
                route.link("set", index=_index(route, port), master=_index(route, wire.device))
            route.link("set", index=_index(route, wire.device), state="up")
    for node in ("lan", "primary", "secondary", ARBITER):
        with netlink(plan.namespace(node)) as route:
            for device in plan.devices(node):
                route.link("set", index=_index(route, device), state="up")
            if plan.service and node in MANAGEMENT:
                device = MGMT if node in HOSTS else "br0"
                route.addr("add", index=_index(route, device), address=MANAGEMENT[node], prefixlen=29)
    _wake_client(plan)


def wake_guests(plan: LabPlan) -> None:
    """Take the guests' ends up. Called when the hooks are in place, so that nothing a guest says leaves unseen.

    Virtual machines have ends of their own.
    """
    for guest in () if plan.virtual else GUESTS:
        with netlink(plan.namespace(guest)) as route:
            for nic in plan.nic_list():
                index = _index(route, nic.guest_device)
                if not plan.talks:
                    _wake_bare(route, index)
                    continue
                _wake_talking(route, index, [(nic.guest_v4, nic.guest_v6)])
                # The SVM's own ARP and ND questions end at the primary, so its table would fill only by answers to the
                # PVM's, if both ask at the same time. A real SVM gets the PVM's table with each checkpoint.
                for address in (nic.client_v4, nic.client_v6):
                    route.neigh("replace", dst=address, lladdr=plan.client().mac, ifindex=index, state=NUD_PERMANENT)
    _wait_until_up(plan)


def remove(plan: LabPlan, netns_dir: Path = NETNS_DIR) -> int:
    """Remove what exists of the lab's namespaces, devices first; returns how many namespaces there were."""
    found = 0
    for node in NODES:
        namespace = plan.namespace(node)
        if not (netns_dir / namespace).exists():
            continue
        found += 1
        # A namespace's devices die some time after its name. Taken down one by one they are gone when this returns.
        # (One that can't be entered was being made when `up` was killed.)
        with suppress(OSError, LabError), netlink(namespace) as route:
            for index in _devices(route).values():
                with suppress(NetlinkError):  # loopback and the kernel's own tunnels stay
                    route.link("del", index=index)
        with suppress(FileNotFoundError):
            namespaces.remove(namespace)
    return found


def describe_devices(plan: LabPlan) -> list[dict[str, Any]]:
    """Each device as it is: node, namespace, name, MAC, ifindex, MTU and addresses."""
    rows: list[dict[str, Any]] = []
    for node in plan.nodes:
        namespace = plan.namespace(node)
        with netlink(namespace) as route:
            addresses: dict[int, list[str]] = {}
            for entry in route.get_addr():
                addresses.setdefault(entry["index"], []).append(f"{entry.get('address')}/{entry['prefixlen']}")
            rows += [
                {
                    "node": node,
                    "namespace": namespace,
                    "name": link.get("ifname"),
                    "mac": link.get("address"),
                    "ifindex": link["index"],
                    "mtu": link.get("mtu"),
                    "addresses": addresses.get(link["index"], []),
                }
                for link in route.get_links()
                if link.get("ifname") in plan.devices(node)
            ]
    return rows


def _add_bridge(plan: LabPlan, bridge: End) -> None:
    with netlink(plan.namespace(bridge.node)) as route:
        route.link(
            "add",
            ifname=bridge.device,
            kind="bridge",
            address=bridge.mac,
            mtu=plan.mtu,
            br_stp_state=0,
            br_mcast_snooping=0,
        )


def _add_veth(plan: LabPlan, one: End, other: End, mtu: int) -> None:
    peer = {"ifname": other.device, "address": other.mac, "mtu": mtu, "net_ns_fd": plan.namespace(other.node)}
    with netlink(plan.namespace(one.node)) as route:
        route.link("add", ifname=one.device, kind="veth", address=one.mac, mtu=mtu, peer=peer)


def _add_tap(plan: LabPlan, tap: End) -> None:
    """One that stays when its virtual machine ends."""
    with netlink(plan.namespace(tap.node)) as route:
        route.link("add", ifname=tap.device, kind="tuntap", mode="tap")
        route.link("set", index=_index(route, tap.device), address=tap.mac, mtu=plan.mtu)


def _wake_client(plan: LabPlan) -> None:
    with netlink(plan.namespace("client")) as route:
        index = _index(route, plan.client().device)
        if plan.talks:
            _wake_talking(route, index, [(nic.client_v4, nic.client_v6) for nic in plan.nic_list()])
        else:
            _wake_bare(route, index)


def _wake_bare(route: Any, index: int) -> None:
    """A port without a stack: every frame that it sees was sent to it by the other side."""
    bare = IFF_UP | IFF_NOARP | IFF_PROMISC
    route.link("set", index=index, flags=bare, mask=bare)


def _wake_talking(route: Any, index: int, addresses: list[tuple[str, str]]) -> None:
    route.link("set", index=index, state="up")
    for v4, v6 in addresses:
        route.addr("add", index=index, address=v4, prefixlen=24)
        route.addr("add", index=index, address=v6, prefixlen=64, flags=IFA_F_NODAD)


def _wait_until_up(plan: LabPlan) -> None:
    deadline = time.monotonic() + UP_TIMEOUT
    for node in plan.nodes:
        # A tap is up as long as a machine runs on it.
        wanted = set(plan.devices(node)) - {tap.device for tap in plan.taps()}
        with netlink(plan.namespace(node)) as route:
            while waiting := [
                link.get("ifname")
                for link in route.get_links()
                if link.get("ifname") in wanted and link.get("operstate") != "UP"
            ]:
                if time.monotonic() > deadline:
                    raise LabError(f"{', '.join(waiting)} on {node} did not come up in {UP_TIMEOUT:.0f} s")
                time.sleep(0.01)


def _devices(route: Any) -> dict[str, int]:
    return {link.get("ifname"): link["index"] for link in route.get_links()}


def _index(route: Any, name: str) -> int:
    return _devices(route)[name]


def _sysctl(values: dict[str, str], proc: Path = Path("/proc/sys/net")) -> None:
    """Set sysctls of the namespace that this thread is in; one that the kernel doesn't have needs no setting."""
    for key, value in values.items():
        with suppress(FileNotFoundError):
            (proc / key).write_text(value)
