"""TLS and SSH into two virtual machines in lock-step, and what differs so often that it is a storm.

A checkpoint copies the state of the kernel's and of OpenSSL's random generators too, so a handshake often comes out the
same in both machines: how many checkpoints it costs is measured here, not demanded.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator

import pytest

from coloebpf.lab import redis
from tests.lab.handshakes import PATIENCE, Tls, ssh
from tests.lab.virtual_lab import VirtualLab, until, virtual_lab

HANDSHAKES = 5
STORM = "storm_count = 3\nstorm_window_ms = 10000\nperiodic_interval_ms = 50\ncalm_ms = 10000"

pytestmark = [pytest.mark.lab, pytest.mark.vm, pytest.mark.real_time, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def lab() -> Iterator[VirtualLab]:
    with virtual_lab() as lab:
        yield lab


def test_tls_works_and_is_in_lockstep_after_its_handshake(lab: VirtualLab, capsys: pytest.CaptureFixture[str]) -> None:
    begin, took, answers = lab.commits(), [], []
    for _ in range(HANDSHAKES):
        connection = Tls(lab.plan)
        took.append(connection.seconds)
        connection.ping()
        lab.checkpoint()  # from here on both machines have the same keys
        proven = lab.nic()["compared_packets"]
        answers += [connection.ping() for _ in range(10)]
        assert lab.nic()["compared_packets"] > proven
        connection.close()
    made = lab.commits() - begin - HANDSHAKES
    with capsys.disabled():
        print(f"\n  TLS: {made} checkpoints for {HANDSHAKES} handshakes; one takes {statistics.median(took):.2f} s "
              f"(median); then an answer {statistics.median(answers) * 1000:.1f} ms")  # fmt: skip


def test_ssh_works_at_the_price_of_checkpoints(lab: VirtualLab, capsys: pytest.CaptureFixture[str]) -> None:
    begin, took = lab.commits(), []
    for number in range(HANDSHAKES):
        said, seconds = ssh(lab.plan, f"echo {number} of {HANDSHAKES}")
        assert said == f"{number} of {HANDSHAKES}\n"
        took.append(seconds)
    made = lab.commits() - begin
    with capsys.disabled():
        print(f"\n  SSH: {made} checkpoints for {HANDSHAKES} logins with one command; one takes "
              f"{statistics.median(took):.2f} s (median)")  # fmt: skip


def test_answers_that_always_differ_are_a_storm_and_their_end_is_lockstep_again(
    lab: VirtualLab, capsys: pytest.CaptureFixture[str]
) -> None:
    lab.reconfigure(STORM)
    client = redis.Connection(lab.plan, "client", lab.plan.nic_list()[0].guest_v4, answer_timeout=PATIENCE)
    end = time.monotonic() + PATIENCE
    while lab.pair(lab.primary)["mode"] != "periodic":
        client.ask("EVAL", redis.CLOCK, "0")
        assert time.monotonic() < end, "no storm"
    reason, took = lab.pair(lab.primary)["mode_reason"], []
    for _ in range(HANDSHAKES):
        connection = Tls(lab.plan)
        took.append(connection.seconds)
        connection.close()
        client.ask("EVAL", redis.CLOCK, "0")
    assert lab.pair(lab.primary)["checkpoints"].get("periodic", 0) > 0
    until(lambda: lab.pair(lab.primary)["mode"] == "lockstep", "the storm is over")
    assert client.ask("PING") == b"PONG"
    client.close()
    with capsys.disabled():
        print(f"\n  storm: {reason}; in periodic mode a TLS handshake takes {statistics.median(took):.2f} s (median)")
