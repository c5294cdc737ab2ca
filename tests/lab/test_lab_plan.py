"""What a lab consists of, by its plan alone."""

from __future__ import annotations

import pytest

from coloebpf.errors import LabError
from coloebpf.lab.plan import FWD_HEADROOM, NODES, VIF_MAC, LabPlan


@pytest.mark.parametrize("name", ["lab", "a", "2", "night-run-7", "x" * 32])
def test_a_good_name_is_part_of_each_namespace(name: str) -> None:
    plan = LabPlan(name)
    assert [plan.namespace(node) for node in NODES] == [f"colo-{name}-{node}" for node in NODES]


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "..", "a.b", "x" * 33, "ä"])
def test_a_name_that_could_leave_its_directory_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="name"):
        LabPlan(name)


@pytest.mark.parametrize(
    ("wanted", "complaint"),
    [
        ({"nics": 0}, "1 to 64"),
        ({"nics": 65}, "1 to 64"),
        ({"mtu": 1400}, "MTU"),
        ({"guests": "many"}, "none"),
        ({"guests": "none", "command": ("true",)}, "process"),
    ],
)
def test_what_makes_no_sense_is_refused(wanted: dict[str, object], complaint: str) -> None:
    with pytest.raises(LabError, match=complaint):
        LabPlan(**wanted)  # type: ignore[arg-type]


def test_each_nic_has_its_own_forward_link() -> None:
    nics = LabPlan(nics=3).nic_list()
    assert [(nic.vif, nic.fwd, nic.vlan) for nic in nics] == [
        ("vif1.0", "fwd0", 0),
        ("vif1.1", "fwd1", 0),
        ("vif1.2", "fwd2", 0),
    ]


def test_nics_share_one_forward_link_with_a_vlan_each() -> None:
    plan = LabPlan(nics=3, vlan=True)
    assert [(nic.fwd, nic.vlan) for nic in plan.nic_list()] == [("fwd0", 100), ("fwd0", 101), ("fwd0", 102)]
    assert [link.one.device for link in plan.links() if link.one.device.startswith("fwd")] == ["fwd0"]


@pytest.mark.parametrize("mtu", [1500, 9000])
def test_forward_links_have_room_for_tags(mtu: int) -> None:
    plan = LabPlan(mtu=mtu, nics=2)
    assert {link.one.device: link.mtu for link in plan.links() if link.one.node == "primary"} == {
        "eth0": mtu,
        "vif1.0": mtu,
        "vif1.1": mtu,
        "fwd0": mtu + FWD_HEADROOM,
        "fwd1": mtu + FWD_HEADROOM,
    }


def test_both_guests_have_the_same_macs_and_nobody_else_has() -> None:
    plan = LabPlan(nics=64)
    ends = [end for link in plan.links() for end in (link.one, link.other)] + plan.bridges()
    by_guest = {guest: [end.mac for end in ends if end.node == guest] for guest in ("pvm", "svm")}
    assert by_guest["pvm"] == by_guest["svm"] == [nic.mac for nic in plan.nic_list()]
    others = [end.mac for end in ends if end.node not in by_guest and end.mac != VIF_MAC]
    assert len(set(others)) == len(others)
    assert not set(others) & set(by_guest["pvm"])


def test_every_nic_has_a_subnet_of_its_own() -> None:
    first, second = LabPlan(nics=2).nic_list()
    assert (first.client_v4, first.guest_v4, first.client_v6, first.guest_v6) == (
        "10.77.0.1",
        "10.77.0.10",
        "fd77::1",
        "fd77::10",
    )
    assert (second.guest_v4, second.guest_v6) == ("10.77.1.10", "fd77:0:0:1::10")
