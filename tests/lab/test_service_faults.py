"""What the services promise while they, their hosts or their links fail, with a client that counts all the time."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import suppress
from functools import partial

import pytest

from coloebpf.errors import ColoError
from coloebpf.lab import guests, services
from tests.lab.service_lab import FWD, MANAGEMENT_LINK, PATIENCE_S, ServiceLab, until

pytestmark = [pytest.mark.lab, pytest.mark.real_time]
DEFAULT_MS = 200  # the configuration's heartbeat_timeout_ms
QUICK_MS = 1500  # for what is no measurement: a CPU of a virtual machine may stand still for longer than 200 ms
ALONE = "interval_max_ms = 60000\ncompare_timeout_ms = 30000"  # no checkpoint but those that a test asks for


# ---- a service is killed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["primary", "secondary"])
def test_given_lockstep_when_a_service_is_killed_then_the_traffic_goes_on_without_it_and_with_the_next(
    lab: ServiceLab, host: str
) -> None:
    client = lab.fresh(pair_changes=ALONE)
    epoch = lab.checkpoint()
    lab.kill(host)
    client.goes_on(100)
    assert lab.state(host) == "lockstep"
    lab.start(host)
    lab.in_lockstep()
    assert lab.checkpoint() > epoch
    client.goes_on()


def test_given_a_checkpoint_when_the_primarys_service_is_killed_then_the_next_one_makes_it_anew(
    lab: ServiceLab,
) -> None:
    client = lab.fresh()
    services.tell_engine(lab.plan, do="hang")
    with suppress(ColoError):
        threading.Thread(target=_ask, args=(lab,), daemon=True).start()
    until(lambda: lab.state("primary") == "checkpointing", "the checkpoint has begun")
    lab.kill("primary")
    time.sleep(0.1)
    before = client.count
    time.sleep(0.5)
    assert client.count <= before + 1  # nothing is proven between two states
    lab.start("primary")
    lab.in_lockstep()
    client.goes_on()


def test_given_no_service_when_the_replicas_differ_then_the_answer_waits_for_the_next_services_checkpoint(
    lab: ServiceLab,
) -> None:
    client = lab.fresh(pair_changes=ALONE)
    lab.set_apart("who", "the primary says", "the other's word")
    other = lab.connect(PATIENCE_S)
    lab.kill("primary")
    other.send("GET", "who")
    assert other.silent_for(1.0)
    client.goes_on()
    lab.start("primary")
    assert other.answer() == b"the primary says"
    assert other.ask("PING") == b"PONG"
    other.close()


def test_given_lockstep_when_the_service_is_told_to_end_then_the_dataplane_stays(lab: ServiceLab) -> None:
    client = lab.fresh(pair_changes=ALONE)
    process = lab.running["primary"]
    lab.kill("primary", signal.SIGTERM)
    assert process.returncode == 0
    client.goes_on(100)
    lab.start("primary")
    lab.in_lockstep()


def test_given_the_policy_open_when_the_service_stays_away_then_what_differs_passes_until_the_next_one(
    lab: ServiceLab,
) -> None:
    client = lab.fresh("none", pair_changes='on_service_loss = "open"\nservice_loss_after_ms = 500')
    lab.set_apart("who", "the primary says", "the other's word")
    lab.kill("primary")
    time.sleep(0.6)
    other = lab.connect(PATIENCE_S)
    assert other.ask("GET", "who") == b"the primary says"
    other.close()
    client.goes_on()
    lab.start("primary")
    lab.in_lockstep()
    assert lab.pair("primary")["checkpoints"]  # a copy that includes what has passed
    client.goes_on()


# ---- the other host is lost ------------------------------------------------------------------------------------------


def test_given_lockstep_when_the_primary_is_switched_off_then_the_replica_goes_on_with_the_connection(
    lab: ServiceLab, capsys: pytest.CaptureFixture[str]
) -> None:
    client = lab.fresh(peer_timeout_ms=DEFAULT_MS)
    client.longest_s = 0.0
    services.switch_off(lab.plan, "primary")
    client.goes_on(50)
    assert lab.state("secondary") == "promoted"
    with capsys.disabled():
        print(f"\n  the client's longest pause when the primary is switched off: {client.longest_s * 1000:.0f} ms")
    fresh = lab.connect(PATIENCE_S)
    assert fresh.ask("PING") == b"PONG"
    fresh.close()


def test_given_a_checkpoint_when_the_primary_is_switched_off_then_the_replica_goes_on(lab: ServiceLab) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS)
    services.tell_engine(lab.plan, do="hang")
    threading.Thread(target=_ask, args=(lab,), daemon=True).start()
    until(lambda: lab.state("primary") == "checkpointing", "the checkpoint has begun")
    services.switch_off(lab.plan, "primary")
    client.goes_on(50)
    assert lab.state("secondary") == "promoted"


def test_given_no_arbiter_when_the_secondarys_service_is_gone_then_the_primary_goes_on_unprotected(
    lab: ServiceLab,
) -> None:
    client = lab.fresh("none", QUICK_MS)
    lab.kill("secondary")
    until(lambda: lab.state("primary") == "passthrough", "the primary goes on alone")
    client.goes_on()
    assert lab.warns("primary", "without protection")
    lab.start("secondary")
    services.protect(lab.plan, lab.running)
    client.goes_on()
    lab.in_lockstep()


def test_given_no_arbiter_when_the_primary_is_switched_off_then_nobody_takes_over_but_by_an_operator(
    lab: ServiceLab,
) -> None:
    client = lab.fresh("none", QUICK_MS)
    services.switch_off(lab.plan, "primary")
    until(lambda: lab.pair("secondary").get("alone_pending"), "the secondary has lost the primary")
    time.sleep(0.5)
    assert lab.state("secondary") == "lockstep"
    services.client_of(lab.plan, "secondary", "failover", pair=services.PAIR_NAME)
    client.goes_on()
    assert lab.state("secondary") == "promoted"


def test_given_lockstep_when_the_primarys_service_is_frozen_then_its_host_is_ended_and_the_replica_goes_on(
    lab: ServiceLab,
) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS)
    lab.kill("primary", signal.SIGSTOP)
    until(lambda: lab.state("secondary") == "promoted", "the secondary takes over")
    client.goes_on(50)
    until(lambda: not guests.running(lab.plan, "primary"), "the arbiter has switched it off, frozen or not")


@pytest.mark.parametrize("host", ["primary", "secondary"])
def test_given_lockstep_when_a_service_is_frozen_for_a_moment_then_nothing_changes(lab: ServiceLab, host: str) -> None:
    client = lab.fresh()
    lab.kill(host, signal.SIGSTOP)
    client.goes_on(100)
    time.sleep(0.5)
    lab.kill(host, signal.SIGCONT)
    lab.in_lockstep()
    lab.checkpoint()
    client.goes_on()


# ---- links are cut ---------------------------------------------------------------------------------------------------


def test_given_lockstep_when_only_the_management_is_cut_then_there_is_a_warning_and_nothing_else(
    lab: ServiceLab,
) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS)
    lab.cut(MANAGEMENT_LINK)
    for host in ("primary", "secondary"):
        until(partial(lab.warns, host, "no heartbeat comes on management"), f"the {host} says so")
    client.goes_on(200)
    assert [lab.state(host) for host in ("primary", "secondary")] == ["lockstep", "lockstep"]
    lab.links("primary", "up", MANAGEMENT_LINK)
    lab.in_lockstep()
    assert lab.checkpoint()
    client.goes_on()


def test_given_lockstep_when_only_the_forward_link_is_cut_then_checkpoints_release_what_nobody_proves(
    lab: ServiceLab,
) -> None:
    client = lab.fresh(peer_timeout_ms=QUICK_MS)
    lab.cut(FWD)
    until(partial(lab.warns, "primary", "no heartbeat comes on fwd0"), "the primary says so")
    client.goes_on(3)
    assert lab.state("primary") in ("lockstep", "checkpointing")
    assert lab.state("secondary") in ("lockstep", "checkpointing")


@pytest.mark.parametrize(("arbiter", "secondary"), [("command", ("off",)), ("none", ("lockstep", "checkpointing"))])
def test_given_lockstep_when_both_links_are_cut_then_the_primary_alone_goes_on(
    lab: ServiceLab, arbiter: str, secondary: tuple[str, ...]
) -> None:
    client = lab.fresh(arbiter, QUICK_MS)
    lab.cut(FWD, MANAGEMENT_LINK)
    until(lambda: lab.state("primary") == "passthrough", "the primary goes on alone")
    client.goes_on()
    assert (lab.state("secondary") if lab.status("secondary") else "off") in secondary


def _ask(lab: ServiceLab) -> None:
    with suppress(ColoError):
        lab.checkpoint()
