"""Given a pair under a real Pacemaker, when a host dies or a link is cut, then there are never two speakers, and one goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from coloebpf.lab import commands, redis, services
from coloebpf.lab.plan import HOSTS, LabPlan
from tests.lab.conftest import new_name
from tests.lab.service_lab import FWD, MANAGEMENT_LINK, Counter, ServiceLab, until
from tests.lab.speakers import Speakers
from tests.pacemaker.cluster import PATIENCE_S, RING_LINK, Cluster, make_root

TREE = Path(__file__).resolve().parents[2]
ROOT = TREE / ".cache" / "pacemaker-root"
LOST_MS = 2000  # a service may stand still for a second on a busy machine
pytestmark = [
    pytest.mark.lab,
    pytest.mark.real_time,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("COLO_PACEMAKER"), reason="takes minutes: make pacemaker-test"),
]


@pytest.fixture(scope="module")
def root() -> Path:
    if not ROOT.exists():
        ROOT.parent.mkdir(exist_ok=True)
        made = ROOT.with_suffix(".new")
        shutil.rmtree(made, ignore_errors=True)
        make_root(made)
        made.rename(ROOT)
    return ROOT


@pytest.fixture
def lab() -> Iterator[ServiceLab]:
    plan = LabPlan(new_name(), "process", command=redis.SERVER, service=True, peer_timeout_ms=LOST_MS)
    try:
        commands.up(plan, services.bring_up)
        yield ServiceLab(plan)
    finally:
        commands.down(plan)


@pytest.fixture
def counter(lab: ServiceLab) -> Iterator[Counter]:
    yield lab.fresh(peer_timeout_ms=LOST_MS)
    lab.leave()


@pytest.fixture
def cluster(lab: ServiceLab, counter: Counter, root: Path, tmp_path: Path) -> Iterator[Cluster]:
    made = Cluster(lab, root, tmp_path)
    try:
        for host in HOSTS:
            made.start(host)
        made.configure()
        until(lambda: made.promoted("primary") == ["primary"], "Pacemaker has promoted the primary", PATIENCE_S)
        assert made.fenced == []
        yield made
    finally:
        made.close()


def one_after_the_other(speakers: Speakers) -> None:
    """Whoever spoke first was silent when the other one began."""
    speakers.stop()
    first, second = speakers.heard["primary"], speakers.heard["secondary"]
    assert not second.frames or first.last_ns < second.first_ns, speakers.heard


def test_when_the_primary_dies_then_the_secondary_is_promoted_after_it_was_fenced(
    cluster: Cluster, counter: Counter
) -> None:
    speakers = Speakers(cluster.plan)
    cluster.power_cut("primary")
    until(lambda: cluster.lab.state("secondary") == "promoted", "the secondary takes over", PATIENCE_S)
    assert cluster.fenced == ["primary"]
    until(lambda: cluster.promoted("secondary") == ["secondary"], "Pacemaker knows", PATIENCE_S)
    counter.goes_on()
    one_after_the_other(speakers)


@pytest.mark.parametrize(
    "links", [(RING_LINK,), (FWD, MANAGEMENT_LINK), (RING_LINK, FWD, MANAGEMENT_LINK)], ids="+".join
)
def test_when_links_are_cut_then_the_primary_wins(cluster: Cluster, counter: Counter, links: tuple[str, ...]) -> None:
    """By the delay of its fence device, whoever asks: Pacemaker or the pair."""
    speakers = Speakers(cluster.plan)
    cluster.lab.cut(*links)
    until(lambda: cluster.lab.state("primary") == "passthrough", "the primary goes on alone", PATIENCE_S)
    assert set(cluster.fenced) == {"secondary"}
    counter.goes_on()
    until(lambda: cluster.promoted("primary") == ["primary"], "Pacemaker knows", PATIENCE_S)
    one_after_the_other(speakers)
    assert speakers.heard["secondary"].frames == 0


def test_when_the_pair_s_management_link_is_cut_then_nobody_is_fenced(cluster: Cluster, counter: Counter) -> None:
    """The forward link brings heartbeats, and the cluster has a link of its own."""
    cluster.lab.cut(MANAGEMENT_LINK)
    until(lambda: not cluster.lab.status("primary")["peer"]["connected"], "the link is down")
    counter.goes_on()
    assert (cluster.fenced, cluster.promoted("primary")) == ([], ["primary"])


def test_when_the_primary_s_host_is_to_be_emptied_then_the_guest_is_handed_over(
    cluster: Cluster, counter: Counter
) -> None:
    speakers = Speakers(cluster.plan)
    cluster.must("primary", "crm", "node", "standby", "primary")
    until(lambda: cluster.promoted("secondary") == ["secondary"], "Pacemaker has moved the role", PATIENCE_S)
    assert [cluster.lab.state(host) for host in HOSTS] == ["halted", "promoted"]
    counter.goes_on()
    one_after_the_other(speakers)
    assert cluster.fenced == []


def test_when_pacemaker_is_stopped_on_both_hosts_then_the_guest_goes_on_in_lock_step(
    cluster: Cluster, counter: Counter
) -> None:
    cluster.must("primary", "crm", "resource", "stop", "guest-clone")
    until(lambda: cluster.promoted("primary") == [], "it is stopped", PATIENCE_S)
    assert [cluster.lab.state(host) for host in HOSTS] == ["lockstep", "lockstep"]
    counter.goes_on()
    assert cluster.fenced == []
