"""Given the documented cluster, when a host dies or links are cut, then there are never two speakers, and one goes on."""

from __future__ import annotations

import shlex
import time

import pytest

from coloebpf.lab import services
from coloebpf.lab.plan import HOSTS
from tests.lab.service_lab import FWD, MANAGEMENT_LINK, Counter, until
from tests.lab.speakers import Speakers
from tests.pacemaker import document
from tests.pacemaker.cluster import NAMES, SECOND_LINK, Cluster
from tests.pacemaker.host import PATIENCE_S

DELAY_S = 5
BEFORE_IT_SHOOTS_S = 15.0  # several times what Pacemaker takes for it on this machine


def operate(cluster: Cluster, command: str) -> None:
    """A command that the document has, on a."""
    cluster.hosts["primary"].must(*shlex.split(document.in_text(command)))


def one_after_the_other(speakers: Speakers) -> None:
    """Whoever spoke first was silent when the other one began."""
    speakers.stop()
    first, second = speakers.heard["primary"], speakers.heard["secondary"]
    assert first.frames, "the watch at the switch has seen nothing"
    assert not second.frames or first.last_ns < second.first_ns, speakers.heard


def test_when_the_primary_dies_then_the_secondary_is_promoted_after_it_was_fenced(
    cluster: Cluster, counter: Counter
) -> None:
    """And it comes back as the secondary, as the document says."""
    speakers = Speakers(cluster.plan)
    cluster.power_cut("primary")
    until(lambda: cluster.lab.state("secondary") == "promoted", "the secondary takes over", PATIENCE_S)
    until(lambda: cluster.promoted("secondary") == ["secondary"], "Pacemaker knows", PATIENCE_S)
    counter.goes_on()
    one_after_the_other(speakers)

    lab = cluster.lab
    cluster.power_on("primary", primary="secondary")
    lab.terminate("secondary")
    cluster.configure("secondary", primary="secondary")
    lab.start(*HOSTS)
    services.protect(cluster.plan, lab.running, "secondary")
    cluster.whole()
    lab.in_lockstep()
    until(lambda: cluster.promoted("primary") == ["secondary"], "Pacemaker has not moved it", PATIENCE_S)
    counter.goes_on()


@pytest.mark.parametrize(
    "links",
    [(MANAGEMENT_LINK, SECOND_LINK), (MANAGEMENT_LINK, FWD), (MANAGEMENT_LINK, FWD, SECOND_LINK)],
    ids="+".join,
)
def test_when_links_are_cut_then_the_primary_wins(cluster: Cluster, counter: Counter, links: tuple[str, ...]) -> None:
    """By the delay of its fence device, whoever asks: Pacemaker or the pair."""
    speakers = Speakers(cluster.plan)
    cluster.lab.cut(*links)
    until(lambda: cluster.lab.state("primary") == "passthrough", "the primary goes on alone", PATIENCE_S)
    assert set(cluster.fenced) == {"secondary"}
    counter.goes_on()
    until(lambda: cluster.promoted("primary") == ["primary"], "Pacemaker knows", PATIENCE_S)

    # It boots, and the links are still cut: it has no quorum until it has seen the other one (wait_for_all).
    cluster.power_on("secondary")
    if SECOND_LINK in links:
        time.sleep(BEFORE_IT_SHOOTS_S)
    assert "primary" not in cluster.fenced
    cluster.mend()
    cluster.lab.start("secondary")
    services.protect(cluster.plan, cluster.lab.running)
    cluster.whole()
    assert "primary" not in cluster.fenced
    assert cluster.promoted("primary") == ["primary"]
    counter.goes_on()
    one_after_the_other(speakers)
    assert speakers.heard["secondary"].frames == 0


def test_the_delay_decides_who_wins(cluster: Cluster, counter: Counter) -> None:
    """It is moved to the other device, as when the roles are exchanged."""
    operate(cluster, "crm resource param fence-a delete pcmk_delay_base")
    operate(cluster, "crm resource param fence-b set pcmk_delay_base 5s")
    speakers = Speakers(cluster.plan)
    cluster.lab.cut(MANAGEMENT_LINK, FWD, SECOND_LINK)
    until(lambda: cluster.lab.state("secondary") == "promoted", "the secondary takes over", PATIENCE_S)
    assert set(cluster.fenced) == {"primary"}
    counter.goes_on()
    until(lambda: cluster.promoted("secondary") == ["secondary"], "Pacemaker knows", PATIENCE_S)
    one_after_the_other(speakers)


def test_when_the_primary_s_host_is_to_be_emptied_then_the_guest_is_handed_over(
    cluster: Cluster, counter: Counter
) -> None:
    speakers = Speakers(cluster.plan)
    operate(cluster, "crm node standby a")
    until(lambda: cluster.promoted("secondary") == ["secondary"], "Pacemaker has moved the role", PATIENCE_S)
    assert [cluster.lab.state(host) for host in HOSTS] == ["halted", "promoted"]
    counter.goes_on()
    one_after_the_other(speakers)
    assert cluster.fenced == []


def test_the_fence_devices_turn_hosts_off_and_one_waits(unprotected: Cluster) -> None:
    """Tried before anything depends on them."""
    took = []
    for host, other in (("primary", "secondary"), ("secondary", "primary")):
        begun = time.monotonic()
        if NAMES[other] == "b":
            operate(unprotected, "stonith_admin --fence b")
        else:
            unprotected.hosts[host].must("stonith_admin", "--fence", NAMES[other])
        took.append(time.monotonic() - begun)
        assert unprotected.fenced == [other]
        assert not unprotected.lab.powered(other)
        unprotected.fenced.clear()
        unprotected.power_on(other)
        unprotected.whole()
    assert took[1] > DELAY_S
    assert took[0] < took[1] - DELAY_S / 2
