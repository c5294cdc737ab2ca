"""Two real virtual machines through failovers and checkpoints: no acknowledged write is lost, and nothing is left over.

COLO_FAILOVERS, COLO_ROLE_CHANGES and COLO_CHECKPOINTS say how many; `make failovers` has the numbers of
docs/measurements.md.
"""

from __future__ import annotations

import os
import random
import re
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from coloebpf.errors import ColoError
from coloebpf.lab import redis, services
from coloebpf.lab.history import History
from coloebpf.lab.plan import HOSTS, LabPlan
from tests.lab.virtual_lab import VirtualLab, until, virtual_lab

FAILOVERS = int(os.environ.get("COLO_FAILOVERS", "3"))
ROLE_CHANGES = int(os.environ.get("COLO_ROLE_CHANGES", "3"))
CHECKPOINTS = int(os.environ.get("COLO_CHECKPOINTS", "100"))
CLIENTS = 4
TRIES = 10  # to open a connection between two checkpoints
ANSWER_S = 20.0  # for an answer that a failover or a busy machine keeps waiting
PAUSE_S = 0.02  # of a client between an answer and its next request

pytestmark = [
    pytest.mark.lab,
    pytest.mark.vm,
    pytest.mark.slow,
    pytest.mark.real_time,
    pytest.mark.timeout(300 + 60 * (FAILOVERS + ROLE_CHANGES) + 2 * CHECKPOINTS),
]


@pytest.fixture
def lab() -> Iterator[VirtualLab]:
    with virtual_lab() as lab:
        yield lab


@pytest.fixture
def history(lab: VirtualLab) -> Iterator[History]:
    """Clients at work, whose connections a checkpoint has made the same in both machines."""
    history = History(lab.plan, CLIENTS, PAUSE_S)
    history.start()
    lab.checkpoint()
    yield history
    history.finish()


def test_a_failover_at_any_moment_loses_no_acknowledged_write(
    lab: VirtualLab, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    seed = int(os.environ.get("COLO_SEED", str(time.time_ns())))
    moments = random.Random(seed)
    for number in range(FAILOVERS):
        time.sleep(moments.uniform(0.2, 2))
        if number % 2:  # in the middle of a checkpoint
            threading.Thread(target=_try_checkpoint, args=(lab.plan, lab.primary), daemon=True).start()
            time.sleep(moments.uniform(0, 0.05))
        lab.lose_the_primary(history)
        lab.protect_again()
        lab.checkpoint()
        if not number:
            after_first = lab.amounts_with_a_standby()
        with capsys.disabled():
            print(f"\n  failover {number + 1}: the clients' longest gap {lab.gaps[-1]:.2f} s", end="", flush=True)
    until(lambda: lab.nic()["held"] == 0 or history.broken, "what is held leaves")
    history.finish()
    assert history.broken == [], f"seed {seed}"
    assert history.check() == [], f"seed {seed}"
    lab.nothing_has_grown(after_first)
    with capsys.disabled():
        gaps = sorted(lab.gaps)
        print(f"\n  {FAILOVERS} failovers under {history.answers:,} requests of {CLIENTS} connections; longest gap: median "
              f"{statistics.median(gaps):.2f} s, most {gaps[-1]:.2f} s")  # fmt: skip


def test_checkpoints_in_a_row_under_load_leave_nothing_behind(
    lab: VirtualLab, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(5):
        lab.checkpoint()
    before, took = lab.amounts_with_a_standby(), []
    for _ in range(CHECKPOINTS):
        took.append(lab.checkpoint())
    history.finish()
    assert history.broken == []
    assert history.check() == []
    until(lambda: lab.nic()["held"] == 0, "what is held leaves")
    lab.nothing_has_grown(before)
    assert lab.pair(lab.primary)["checkpoints_failed"] == 0
    with capsys.disabled():
        took.sort()
        print(f"\n  {CHECKPOINTS} checkpoints under {history.answers:,} requests: median "
              f"{statistics.median(took) * 1000:.0f} ms, p99 {took[int(len(took) * 0.99)] * 1000:.0f} ms")  # fmt: skip


def test_a_connection_younger_than_the_last_checkpoint_lives_through_every_change_of_roles(
    lab: VirtualLab, history: History, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each change finds one more: the guest's own numbers are others than those that the client began with."""
    young: list[redis.Connection] = []
    asked = 0

    def ask() -> None:
        nonlocal asked
        for connection in young:
            asked += 1
            assert connection.ask("INCR", "young") == str(asked).encode()

    for number in range(ROLE_CHANGES):
        lab.reconfigure("interval_max_ms = 60000")
        young.append(_open_young(lab))
        ask()
        lab.lose_the_primary(history)
        ask()
        lab.protect_again()
        ask()
        lab.checkpoint()
        ask()
        with capsys.disabled():
            print(f"\n  change of roles {number + 1}: {len(young)} young connections live", end="", flush=True)
    assert history.broken == []
    kept = sum(_kept(lab, host) for host in HOSTS)
    assert kept, "a checkpoint came each time between a connection's opening and the loss: this run shows nothing"
    for connection in young:
        connection.close()
    history.finish()
    assert history.check() == []


def _kept(lab: VirtualLab, host: str) -> int:
    """Connections that a host's service has found to have other numbers, each time that it became a primary's."""
    log = services.directory(lab.plan, host) / services.LOG
    return sum(map(int, re.findall(r"by other numbers .*connections=(\d+)", log.read_text())))


def _open_young(lab: VirtualLab) -> redis.Connection:
    """A connection that no checkpoint has made the same in both machines."""
    address = lab.plan.nic_list()[0].guest_v4
    for _ in range(TRIES):
        lab.checkpoint()
        epoch = lab.pair(lab.primary)["epoch"]
        connection = redis.Connection(lab.plan, "client", address, answer_timeout=ANSWER_S)
        assert connection.ask("PING") == b"PONG"
        if lab.pair(lab.primary)["epoch"] == epoch:
            return connection
        connection.close()
    raise AssertionError(f"a checkpoint came each of {TRIES} times")


def _try_checkpoint(plan: LabPlan, primary: str) -> None:
    with suppress(ColoError):
        services.checkpoint(plan, primary)
