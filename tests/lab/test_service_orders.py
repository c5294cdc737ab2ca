"""What an operator orders, and is told, when hosts are well, lost, or have no right to speak."""

from __future__ import annotations

import time
from functools import partial

import pytest

from coloebpf.control import Control
from coloebpf.errors import ServiceError
from coloebpf.lab import guests, services
from coloebpf.lab.plan import HOSTS, PAIR
from coloebpf.netns import inside
from tests.lab.service_lab import FWD, MANAGEMENT_LINK, ServiceLab, until
from tests.lab.test_service_faults import QUICK_MS

pytestmark = [pytest.mark.lab, pytest.mark.real_time]


def order(lab: ServiceLab, host: str, what: str) -> str:
    return str(services.client_of(lab.plan, host, what, pair=services.PAIR_NAME))


def undecided(lab: ServiceLab, host: str) -> bool:
    return bool(lab.pair(host).get("alone_pending"))


def test_given_lockstep_when_the_primary_hands_over_then_the_replica_goes_on_and_no_host_is_switched_off(
    lab: ServiceLab,
) -> None:
    client = lab.fresh()
    assert "this host is silent" in order(lab, "primary", "failover")
    client.goes_on(50)
    assert [lab.state(host) for host in HOSTS] == ["halted", "promoted"]
    assert all(guests.running(lab.plan, host) for host in HOSTS)
    with pytest.raises(ServiceError, match="may run on the other host"):
        order(lab, "primary", "unprotect")
    client.goes_on()


def test_given_both_links_cut_when_fencing_fails_then_the_pair_waits_until_an_operator_decides(lab: ServiceLab) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS)
    switches = {host: services.switch_of(lab.plan, host) for host in HOSTS}
    kept = {host: path.read_text() for host, path in switches.items()}
    try:
        for path in switches.values():
            path.write_text("#!/bin/sh\nexit 1\n")
        lab.cut(FWD, MANAGEMENT_LINK)
        for host in HOSTS:
            until(partial(undecided, lab, host), f"the {host} has lost the other host")
        before = client.count
        time.sleep(0.5)
        assert client.count <= before + 1, "nothing unproven leaves"
        order(lab, "primary", "failover")
        client.goes_on()
        assert [lab.state(host) for host in HOSTS] == ["passthrough", "lockstep"]
    finally:
        for host, path in switches.items():
            path.write_text(kept[host])


def test_given_a_right_that_has_ended_when_the_guest_speaks_then_it_is_dropped_and_the_status_says_so(
    lab: ServiceLab,
) -> None:
    client = lab.fresh()
    with inside(lab.plan.namespace("primary")), Control.open(lab.plan.pin_dir("primary")) as control:
        control.set_deadline(PAIR, 1)
        until(partial(lab.warns, "primary", "right to speak has ended"), "the status says so")
        assert lab.pair("primary")["silent"]
        before = client.count
        time.sleep(0.3)
        assert client.count <= before + 1
        control.set_deadline(PAIR, 0)
    client.goes_on()
    assert not lab.pair("primary")["silent"]
