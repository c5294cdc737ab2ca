"""The devices of the configured NICs: there, wide enough, free, wired, in their bridges."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import Any

from pyroute2 import IPRoute

from coloebpf.errors import ColoError, DeviceError
from coloebpf.model import Role
from coloebpf.netdev import Device, Devices
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.config import NicConfig, PairConfig
from coloebpf.tuning import stay_on

BRIDGE_FILTERS = ("iptables", "ip6tables", "arptables")


def _nics(host: Host) -> Iterator[tuple[PairConfig, NicConfig]]:
    for pair in host.known.pairs:
        for nic in pair.nics:
            yield pair, nic


def _forwards(host: Host) -> list[str]:
    return list(dict.fromkeys(nic.fwd for _, nic in _nics(host)))


def devices(host: Host) -> Iterator[Finding]:
    """Each vif and forward device exists; forward devices are up and have a carrier."""
    links = _links()
    for pair, nic in _nics(host):
        if nic.vif in links:
            yield Finding(OK, f"{nic.vif} of pair {pair.name} is there")
        else:
            yield Finding(
                WARN,
                f"{nic.vif} of pair {pair.name} does not exist",
                "start the guest; if it runs, `xl network-list` and `ip link` show its device's name",
            )
    for name in _forwards(host):
        link = links.get(name)
        if link is None:
            yield Finding(
                FAIL,
                f"forward device {name} does not exist",
                "`ip link` lists the devices; it is the NIC that is wired to the other host",
            )
        elif link["state"] == "down":
            yield Finding(FAIL, f"{name} is down", f"ip link set {name} up")
        elif link.get("operstate") in ("DOWN", "LOWERLAYERDOWN"):
            yield Finding(FAIL, f"{name} has no carrier", "is the cable in, and the other host up?")
        else:
            yield Finding(OK, f"{name} is up")


def _links() -> dict[str, Any]:
    with IPRoute() as route:
        return {link.get("ifname"): link for link in route.get_links()}


def _pairs_of_devices(host: Host, found: Devices) -> Iterator[tuple[NicConfig, Device, Device]]:
    """NIC, vif, forward device; a vif that is not there yet is taken to be as wide as it may be."""
    for _, nic in _nics(host):
        if found.index(nic.fwd) is None:
            continue
        there = found.index(nic.vif) is not None
        vif = found.find(nic.vif) if there else Device(nic.vif, -1, host.known.host.mtu, None, False, {})
        yield nic, vif, found.find(nic.fwd)


def forward(host: Host) -> Iterator[Finding]:
    """Forward devices are what the loader will ask of them: MTU, no address, no master."""
    with Devices() as found:
        for nic, vif, fwd in _pairs_of_devices(host, found):
            try:
                found.check_forward(fwd, vif, host.known.host.mtu)
            except DeviceError as error:
                yield Finding(FAIL, str(error))
            else:
                yield Finding(OK, f"{nic.fwd} can carry {nic.vif}: MTU {fwd.mtu}")


def hooks(host: Host) -> Iterator[Finding]:
    """No other program holds them."""
    with Devices() as found:
        for nic, vif, fwd in _pairs_of_devices(host, found):
            wanted = [(fwd, "ingress"), *((vif, side) for side in ("ingress", "egress") if vif.index >= 0)]
            try:
                ours = [found.check_free(device, side) for device, side in wanted]
                ours.append(found.check_xdp_free(fwd))
            except ColoError as error:
                yield Finding(FAIL, str(error), "take that program away, or give coloebpf another device")
            else:
                held = "coloebpf's programs are there" if any(ours) else "free"
                yield Finding(OK, f"{nic.vif} and {nic.fwd}: {held}")


def offloads(host: Host) -> Iterator[Finding]:
    """None that the forward link can't bear is fixed; the others are turned off by the loader."""
    for name in _forwards(host):
        try:
            done = subprocess.run(["ethtool", "-k", name], capture_output=True, text=True, check=False)
        except OSError as error:
            yield Finding(FAIL, f"ethtool can't be run ({error.strerror})", "apt-get install ethtool")
            return
        if done.returncode:
            continue  # there is no such device, which devices() says
        yield from judge_offloads(name, done.stdout)


def judge_offloads(name: str, listing: str) -> Iterator[Finding]:
    """Of what `ethtool -k` has said."""
    on = stay_on(listing)
    fixed = [feature for feature, value in on if "fixed" in value]
    if fixed:
        yield Finding(
            FAIL,
            f"{name}: {', '.join(fixed)} can't be turned off, and frames would not be what a wire carries",
            "use a NIC, or a driver, whose offloads can be turned off",
        )
    else:
        yield Finding(OK, f"{name}: {f'{len(on)} will be turned off' if on else 'all are off'}")


def bridge(host: Host) -> Iterator[Finding]:
    """Guests are in their bridges, and nothing filters there unseen."""
    links = _links()
    names = {link["index"]: name for name, link in links.items()}
    bridges = {name for name, link in links.items() if (info := link.get("linkinfo")) and info.get("kind") == "bridge"}
    for pair, nic in _nics(host):
        if nic.bridge and nic.bridge not in bridges:
            advice = f"ip link add {nic.bridge} type bridge, or correct the configuration"
            yield Finding(FAIL, f"{nic.bridge} of pair {pair.name} is no bridge here", advice)
        elif nic.vif in links:
            yield _membership(pair, nic, names.get(links[nic.vif].get("master"), ""), bridges)
    for kind in BRIDGE_FILTERS:
        path = host.at(f"/proc/sys/net/bridge/bridge-nf-call-{kind}")
        if path.exists() and path.read_text().strip() != "0":
            yield Finding(
                WARN,
                f"frames through bridges pass {kind}, whose rules may drop what was released",
                f"sysctl net.bridge.bridge-nf-call-{kind}=0",
            )


def _membership(pair: PairConfig, nic: NicConfig, master: str, bridges: set[str]) -> Finding:
    if master not in bridges:
        primary = pair.role == Role.PRIMARY
        return Finding(
            FAIL if primary else WARN,
            f"{nic.vif} is in no bridge: clients {'do' if primary else 'would'} not reach it",
            f"ip link set {nic.vif} master {nic.bridge or 'BRIDGE'}",
        )
    if nic.bridge and master != nic.bridge:
        return Finding(
            FAIL,
            f"{nic.vif} is in bridge {master}, the configuration says {nic.bridge}",
            f"ip link set {nic.vif} master {nic.bridge}, or correct the configuration",
        )
    return Finding(OK, f"{nic.vif} is in {master}")
