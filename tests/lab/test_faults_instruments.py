"""The watch and the probe of test_faults_matrix.py notice what they are there for."""

from __future__ import annotations

import socket

import pytest

from coloebpf.control import Control, State
from coloebpf.lab import services
from coloebpf.lab.plan import HOSTS, PAIR
from coloebpf.netns import inside
from tests.lab.probe import Probe
from tests.lab.service_lab import ServiceLab, until
from tests.lab.speakers import Speakers

pytestmark = pytest.mark.lab
UNCOMPARED = '[[pair.exempt]]\nnic = 0\nprotocol = "tcp"\nguest_port = 6379\n'


def say(lab: ServiceLab, guest: str) -> None:
    """One datagram to the client."""
    with inside(lab.plan.namespace(guest)), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.sendto(b"a word", (lab.plan.nic_list()[0].client_v4, 9))


def test_given_two_hosts_that_both_let_their_guest_speak_then_the_watch_says_so(lab: ServiceLab) -> None:
    lab.reset()
    for host, state in (("primary", State.PASSTHROUGH), ("secondary", State.PROMOTED)):
        with Control.open(lab.plan.pin_dir(host)) as control:
            control.set_state(PAIR, state)
    watch = Speakers(lab.plan)
    try:
        for guest, host in (("svm", "secondary"), ("pvm", "primary")):
            before = watch.heard[host].frames
            say(lab, guest)
            until(lambda h=host, n=before: watch.heard[h].frames > n, f"the {host} is heard")  # type: ignore[misc]
        with pytest.raises(AssertionError, match="two speakers"):
            watch.check()
    finally:
        watch.stop()


def test_given_an_exemption_when_the_replicas_differ_then_the_probe_says_that_it_was_answered_without_proof(
    lab: ServiceLab,
) -> None:
    lab.reset()
    for host in HOSTS:
        with (services.directory(lab.plan, host) / "coloebpf.toml").open("a") as file:
            file.write(UNCOMPARED)
    lab.start(*HOSTS)
    services.protect(lab.plan, lab.running)
    probe = Probe(lab, 0.01)
    try:
        until(lambda: probe.wrong, "an answer without a proof")
        with pytest.raises(AssertionError, match="unproven"):
            probe.check()
    finally:
        probe.finish()
