"""Given the documented cluster, when nothing is lost that a host has to be fenced for, then none is."""

from __future__ import annotations

import shlex

import pytest

from coloebpf.lab.plan import HOSTS
from tests.lab.service_lab import FWD, MANAGEMENT_LINK, until
from tests.lab.speakers import Speakers
from tests.pacemaker import document
from tests.pacemaker.cluster import NAMES, SECOND_LINK, Cluster
from tests.pacemaker.conftest import running_counter
from tests.pacemaker.host import AGENT, PATIENCE_S

LATE_S = 60.0


def lockstep(cluster: Cluster) -> bool:
    return [cluster.lab.state(host) for host in HOSTS] == ["lockstep", "lockstep"]


def test_there_are_two_links_with_encryption(steady: Cluster) -> None:
    for host in HOSTS:
        shown = steady.hosts[host].must("corosync-cfgtool", "-s")
        assert "transport: knet" not in shown  # its own words are in capitals
        assert shown.count("connected") >= 2, shown
        assert "disconnected" not in shown
        keys = steady.hosts[host].must("corosync-cmapctl")
        assert "totem.crypto_cipher (str) = aes256" in keys
        assert "quorum.two_node (u8) = 1" in keys


def test_the_agent_s_meta_data_is_valid(steady: Cluster) -> None:
    """By the definition that Debian ships."""
    host = steady.hosts["primary"]
    host.must(
        "sh",
        "-c",
        f"cd /usr/share/resource-agents && /{AGENT} meta-data >/tmp/m.xml && xmllint --noout --valid --path . /tmp/m.xml",
    )


def test_ocf_tester_has_no_complaint(steady: Cluster) -> None:
    """On the primary, whose guest speaks and goes on speaking."""
    pair = document.here("pair=web")
    said = steady.hosts["primary"].must("ocf-tester", "-n", "tested", "-o", pair, f"/{AGENT}")
    assert "passed all tests" in said
    assert lockstep(steady)
    running_counter(steady).goes_on()


@pytest.mark.parametrize("links", [(MANAGEMENT_LINK,), (SECOND_LINK,), (FWD,), (FWD, SECOND_LINK)], ids="+".join)
def test_when_one_way_is_left_to_the_pair_and_to_the_cluster_then_the_guest_goes_on(
    steady: Cluster, links: tuple[str, ...]
) -> None:
    speakers, counter = Speakers(steady.plan), running_counter(steady)
    steady.lab.cut(*links)
    until(lambda: steady.lab.warns("primary", "no heartbeat comes") or links == (SECOND_LINK,), "the link is missed")
    counter.goes_on(5 if FWD in links else 200, LATE_S)  # without fwd each answer takes a checkpoint
    assert (steady.fenced, steady.promoted("primary")) == ([], ["primary"])
    steady.mend()
    steady.lab.in_lockstep()
    counter.goes_on()
    until(lambda: lockstep(steady), "lock-step", PATIENCE_S)
    speakers.stop()
    assert speakers.heard["primary"].frames > 0
    assert (steady.fenced, speakers.heard["secondary"].frames) == ([], 0)
    for host in HOSTS:
        links_of = steady.hosts[host]
        until(lambda: "disconnected" not in links_of.must("corosync-cfgtool", "-s"), "its links are back", PATIENCE_S)  # noqa: B023


def test_when_pacemaker_s_part_is_stopped_then_the_guest_goes_on_in_lock_step(steady: Cluster) -> None:
    counter = running_counter(steady)
    a = steady.hosts["primary"]
    a.must(*shlex.split(document.in_text("crm resource stop web-clone")))
    until(lambda: steady.promoted("primary") == [], "it is stopped", PATIENCE_S)
    assert lockstep(steady)
    counter.goes_on()
    a.must(*shlex.split(document.in_text("crm resource start web-clone")))
    until(lambda: steady.promoted("secondary") == ["primary"], f"{NAMES['primary']} is promoted again", PATIENCE_S)
    counter.goes_on()
    assert steady.fenced == []
