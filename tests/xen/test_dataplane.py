"""coloebpf's programs on the devices that Xen's guests really have: netback's vif, and the tap of an emulated NIC."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from tests.xen import service
from tests.xen.guests import KINDS, Guest
from tests.xen.lab import Lab

pytestmark = [pytest.mark.xen, pytest.mark.timeout(3600)]
PINGS = 5


@dataclass(frozen=True)
class Guests:
    """One of each kind on host 1, behind the service's programs."""

    lab: Lab
    vifs: dict[str, str]  # by kind
    of_kind: dict[str, Guest]


@pytest.fixture(scope="module")
def guests(lab: Lab) -> Iterator[Guests]:
    of_kind = {kind: Guest(f"{kind}-guest", kind, number) for kind, number in KINDS.items()}
    vifs = {kind: guest.vif(lab.create(1, guest)) for kind, guest in of_kind.items()}
    service.hand_out_certificates(lab)
    service.configure(lab, 1, {of_kind[kind]: vif for kind, vif in vifs.items()})
    service.start(lab, 1)
    try:
        yield Guests(lab, vifs, of_kind)
    finally:
        service.stop(lab, 1)
        for guest in of_kind.values():
            lab.run(1, f"xl destroy {guest.name}")


@pytest.mark.parametrize("kind", KINDS)
def test_the_programs_are_on_the_device(guests: Guests, kind: str) -> None:
    for side, program in (("egress", "p1_mirror"), ("ingress", "p2_output")):
        shown = guests.lab.run(1, f"tc filter show dev {guests.vifs[kind]} {side}")
        assert f"coloebpf:{program}" in shown, shown


@pytest.mark.parametrize("kind", KINDS)
def test_traffic_goes_through_the_programs(guests: Guests, kind: str) -> None:
    lab = guests.lab
    lab.run(1, "sysctl -qw kernel.bpf_stats_enabled=1")
    before = runs(lab)
    lab.on_client(f"busybox ping -c {PINGS} -W 60 {guests.of_kind[kind].address}")
    after = runs(lab)
    for program in before:
        assert after[program] - before[program] >= PINGS, (before, after)


def runs(lab: Lab) -> dict[str, int]:
    """How often the programs of a primary's vif have run."""
    shown: list[dict[str, Any]] = json.loads(lab.run(1, "bpftool -j prog show"))
    return {each["name"]: each.get("run_cnt", 0) for each in shown if each.get("name") in ("p1_mirror", "p2_output")}


def test_netback_has_generic_xdp_only(guests: Guests) -> None:
    lab, vif = guests.lab, guests.vifs["pvh"]
    program = "/sys/fs/bpf/coloebpf/host/link_arrive"
    refused = lab.run(1, f"ip link set dev {vif} xdpdrv pinned {program} 2>&1 || echo refused", check=False)
    assert "refused" in refused, refused
    try:
        lab.run(1, f"ip link set dev {vif} xdpgeneric pinned {program}")
        assert "xdpgeneric" in lab.run(1, f"ip link show dev {vif}")
    finally:
        lab.run(1, f"ip link set dev {vif} xdpgeneric off", check=False)
