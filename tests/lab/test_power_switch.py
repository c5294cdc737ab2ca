"""The lab's power switch, as both hosts' fencing command: who is off does nothing more, and the first to be off stays it."""

from __future__ import annotations

import fcntl
import subprocess
from pathlib import Path

import pytest

from coloebpf.lab import guests, services
from coloebpf.lab.plan import HOSTS
from coloebpf.netns import inside
from tests.lab.service_lab import ServiceLab, until
from tests.lab.test_service_faults import DEFAULT_MS

pytestmark = [pytest.mark.lab, pytest.mark.real_time]


def test_given_a_slow_switch_when_the_primary_is_switched_off_then_it_does_not_switch_off_the_secondary(
    lab: ServiceLab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of its steps takes longer than a dead host's heartbeats are waited for."""
    slow = tmp_path / "ip"
    slow.write_text('#!/bin/sh\n/sbin/ip "$@"\ncode=$?\nsleep 1\nexit $code\n')
    slow.chmod(0o700)
    client = lab.fresh(peer_timeout_ms=DEFAULT_MS)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/sbin:/usr/bin:/sbin:/bin")
    services.switch_off(lab.plan, "primary")
    until(lambda: lab.state("secondary") == "promoted", "the secondary takes over")
    assert lab.powered("secondary")
    client.goes_on(50)


def test_given_two_hosts_that_switch_each_other_off_when_both_do_at_once_then_one_is_left(lab: ServiceLab) -> None:
    """As a power distribution unit, which does one thing after the other, and what is off asks for nothing."""
    lab.reset()
    running = {}
    with services.switch_lock(lab.plan).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for host in HOSTS:
            with inside(lab.plan.namespace(host)):
                running[host] = subprocess.Popen([services.switch_of(lab.plan, services.other(host))])
        until(lambda: all(len(guests.running(lab.plan, host)) > 1 for host in HOSTS), "both commands wait")
    codes = {host: process.wait(30) for host, process in running.items()}
    alive = [host for host in HOSTS if lab.powered(host)]
    assert [host for host in HOSTS if codes[host] == 0] == alive
    assert len(alive) == 1
