"""The clients that note a history: right servers pass, and each kind of loss is told."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from coloebpf.lab import redis
from coloebpf.lab.history import History
from coloebpf.lab.plan import GUESTS
from coloebpf.lab.redis import Connection
from tests.lab.service_lab import ServiceLab

pytestmark = [pytest.mark.lab, pytest.mark.real_time]


def recorded(lab: ServiceLab) -> History:
    """Some answers of three clients."""
    lab.fresh()
    history = History(lab.plan, clients=3, pause_s=0.002)
    history.start()
    until(lambda: min(client.record.answers for client in history.clients) > 20)
    history.finish()
    assert history.broken == []
    return history


def everywhere(lab: ServiceLab, *words: str) -> None:
    """A command to both replicas, beside the dataplane."""
    for guest in GUESTS:
        replica = redis.Connection(lab.plan, guest, "127.0.0.1")
        replica.ask(*words)
        replica.close()


def test_lockstep_is_linearizable_and_loses_nothing(lab: ServiceLab) -> None:
    history = recorded(lab)
    assert history.check() == []
    latencies = history.latencies()
    assert len(latencies) == history.answers
    assert 0 < latencies[0] <= latencies[-1] <= history.gap()


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (("DEL", "register-0"), "register-0: "),
        (("RPOP", "list-1"), "list-1: 1 of "),
        (("DEL", "list-2"), "list-2: "),
    ],
)
def test_a_lost_write_is_told(lab: ServiceLab, loss: tuple[str, ...], words: str) -> None:
    history = recorded(lab)
    everywhere(lab, *loss)
    found = history.check()
    assert found
    assert all(told.startswith(words) for told in found), found


def test_a_wrong_answer_and_a_broken_connection_are_told(lab: ServiceLab) -> None:
    lab.fresh()
    history = History(lab.plan, clients=1, pause_s=0.002)
    history.start()
    until(lambda: bool(history.clients[0].record.pushed))
    everywhere(lab, "RPUSH", "list-0", "somebody else's")
    until(lambda: bool(history.clients[0].record.wrong))
    everywhere(lab, "CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
    until(lambda: bool(history.broken))
    history.finish()
    assert any("instead of" in told for told in history.check())


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_answer_of_a_missing_key_is_known(lab: ServiceLab) -> None:
    lab.fresh()
    assert Connection(lab.plan, "client", lab.plan.nic_list()[0].guest_v4).ask("GET", "nothing") == redis.NIL
