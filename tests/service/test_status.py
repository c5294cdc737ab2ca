"""The status object: what readers of its JSON rely on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from coloebpf.model import State
from coloebpf.service.config import parse
from coloebpf.service.status import DURATION_EDGES_S, Durations, NicStatus, PairStatus, Status, Uncompared


def test_it_is_json_through_and_through() -> None:
    pair = PairStatus(name="web", number=0, role="primary", uncompared=[Uncompared.passed(0, "arp")])
    status = Status(host="a", version="1", time=1.5, pairs=[pair])
    assert json.loads(json.dumps(status.as_dict()))["pairs"][0]["uncompared"] == [
        {"nic": 0, "why": "policy", "what": "ARP"}
    ]


def test_a_pair_begins_in_a_state_that_the_dataplane_knows() -> None:
    assert PairStatus(name="web", number=0, role="primary").state.upper() in State.__members__


@pytest.mark.parametrize(
    ("port", "what"),
    [(0, "udp with 0.0.0.0/0"), (123, "udp of the guest's port 123 with 0.0.0.0/0")],
)
def test_an_exemption_in_words(port: int, what: str) -> None:
    assert Uncompared.exempted(0, "udp", port, "0.0.0.0/0") == Uncompared(nic=0, why="exemption", what=what)


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.001, 0), (0.0011, 1), (30.0, len(DURATION_EDGES_S) - 1), (30.1, len(DURATION_EDGES_S))],
)
def test_a_duration_falls_under_the_edge_that_it_does_not_exceed(seconds: float, bucket: int) -> None:
    times = Durations()
    times.observe(seconds)
    assert times.counts.index(1) == bucket
    assert sum(times.counts) == 1
    assert times.sum_s == seconds


def test_two_histograms_share_no_counts() -> None:
    Durations().observe(1)
    assert sum(Durations().counts) == 0


CONFIG = """
[host]
name = "a"
[peer]
name = "b"
listen = "192.0.2.1:7788"
connect = "192.0.2.2:7788"
[[pair]]
name = "web"
number = 3
role = "secondary"
engine = "model"
on_service_loss = "open"
[pair.model]
[[pair.nic]]
number = 5
vif = "vif1.0"
fwd = "fwd0"
vlan = 7
bridge = "br0"
mac = "02:c0:10:00:00:01"
nd = "compare"
other = "pass"
[[pair.exempt]]
protocol = "udp"
guest_port = 123
nic = 5
[[pair.exempt]]
protocol = 99
remote = "10.0.0.0/8"
nic = 5
"""


def test_a_pairs_status_begins_with_its_configuration() -> None:
    (pair,) = parse(CONFIG, Path("x")).pairs
    status = PairStatus.of(pair)
    assert (status.name, status.number, status.role, status.engine) == ("web", 3, "secondary", "model")
    assert (status.arbiter, status.on_service_loss) == ("none", "open")
    assert status.nics == [NicStatus(number=5, vif="vif1.0", fwd="fwd0", vlan=7, bridge="br0", mac="02:c0:10:00:00:01")]
    assert {(entry.why, entry.what) for entry in status.uncompared} == {
        ("exemption", "udp of the guest's port 123 with 0.0.0.0/0"),
        ("exemption", "protocol 99 with 10.0.0.0/8"),
        ("policy", "ARP"),
        ("policy", "Ethernet types other than IP and ARP"),
    }
    assert {entry.nic for entry in status.uncompared} == {5}
