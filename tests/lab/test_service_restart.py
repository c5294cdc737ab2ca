"""Restarts of a service with a heartbeat timeout that is shorter than most of them."""

from __future__ import annotations

import time
from functools import partial

import pytest

from coloebpf.lab import guests, services
from coloebpf.lab.plan import HOSTS
from tests.lab.service_lab import SOON, ServiceLab, until
from tests.lab.test_service_faults import DEFAULT_MS, QUICK_MS

pytestmark = [pytest.mark.lab, pytest.mark.real_time]
GRACE_S = 6.0
LONG = "restart_grace_ms = 10000"  # the usual 5 s are not enough on a machine that others have most of
SHORT = f"restart_grace_ms = {GRACE_S * 1000:.0f}"


@pytest.mark.parametrize("host", HOSTS)
def test_given_lockstep_when_a_service_is_restarted_then_both_hosts_go_on_as_they_were(
    lab: ServiceLab, host: str, capsys: pytest.CaptureFixture[str]
) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS, peer_changes=LONG)
    client.longest_s = 0.0
    begin, before = time.monotonic(), client.count
    lab.terminate(host)
    lab.start(host)
    until(lambda: lab.status(host).get("peer", {}).get("connected"), "the next service has found the other host")
    away_s, answers = time.monotonic() - begin, client.count - before
    lab.in_lockstep()
    client.goes_on(200)
    with capsys.disabled():
        print(f"\n  {host}: back after {away_s:.1f} s, the client's longest pause {client.longest_s * 1000:.0f} ms")
    assert answers > 10, "the client waited for the service"
    assert lab.checkpoint()
    assert [lab.state(each) for each in HOSTS] == ["lockstep", "lockstep"]
    assert all(guests.running(lab.plan, each) for each in HOSTS)  # nobody was switched off


def test_given_a_restart_of_the_primarys_service_when_its_host_dies_then_the_replica_goes_on_behind_the_grace(
    lab: ServiceLab,
) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS, peer_changes=SHORT)
    begin = time.monotonic()
    lab.terminate("primary")
    until(partial(lab.warns, "secondary", "the service of primary restarts"), "the secondary says so")
    client.goes_on(20)
    services.switch_off(lab.plan, "primary")
    client.goes_on(50)
    assert lab.state("secondary") == "promoted"
    assert time.monotonic() - begin > GRACE_S


def test_given_a_restart_of_the_secondarys_service_when_it_stays_away_then_the_primary_goes_on_alone(
    lab: ServiceLab,
) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS, peer_changes=SHORT)
    lab.terminate("secondary")
    client.goes_on(50)
    assert lab.state("primary") == "lockstep"
    until(lambda: lab.state("primary") == "passthrough", "the primary goes on alone")
    client.goes_on()


@pytest.mark.parametrize(("host", "alone"), [("primary", "promoted"), ("secondary", "passthrough")])
def test_given_lockstep_when_a_service_is_killed_then_its_next_one_comes_too_late_and_the_other_host_goes_on(
    lab: ServiceLab, host: str, alone: str
) -> None:
    """A crash says no goodbye. systemd starts the next service after 0.1 s, and the arbiter has turned the host off."""
    client = lab.fresh(peer_timeout_ms=DEFAULT_MS)
    lab.kill(host)
    time.sleep(0.1)
    lab.start(host)
    other = HOSTS[1 - HOSTS.index(host)]
    until(lambda: lab.state(other) == alone, f"the {other} goes on alone")
    until(lambda: not guests.running(lab.plan, host), f"the {host} is off")
    client.goes_on(50)
    assert client.longest_s < SOON
