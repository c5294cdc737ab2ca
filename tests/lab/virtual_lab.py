"""A lab with virtual machines that a test takes through failovers and checkpoints, and what must not be left over."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from coloebpf.lab import commands, guests, image, machine, needs, services
from coloebpf.lab.history import History
from coloebpf.lab.plan import HOSTS, LabPlan
from tests.lab.conftest import new_name

SOON = 60.0  # seconds that anything may take: two emulated machines and both services share this one's CPUs
# The services wait for the CPU too: silence for less is no sign of a lost host here.
MACHINES = 3  # PVM, SVM, and the standby that is being filled
PEER_TIMEOUT_MS = 3000
RELOADED = "configuration is reloaded"  # in a service's log


@dataclass(frozen=True)
class Amounts:
    """What the lab's programs hold on to."""

    machines: int
    descriptors: int  # of both services
    threads: int
    slots: int
    devices: int
    files: int  # of the lab

    def exceeds(self, other: Amounts) -> list[str]:
        """What has grown, in words."""
        return [
            f"{name}: {getattr(other, name)} before, {value} after"
            for name, value in vars(self).items()
            if value > getattr(other, name)
        ]


@dataclass
class VirtualLab:
    """The lab `plan`, up and protected. `primary`: the host that has the guest now."""

    plan: LabPlan
    running: services.Running
    primary: str = HOSTS[0]
    gaps: list[float] = field(default_factory=list)  # of the clients at each failover, seconds

    @property
    def secondary(self) -> str:
        return services.other(self.primary)

    def pair(self, host: str) -> dict[str, Any]:
        status = services.service_status(self.plan, host)
        return dict(status["pairs"][0]) if status and status["pairs"] else {}

    def nic(self) -> dict[str, Any]:
        """The primary's counters."""
        nic: dict[str, Any] = services.snapshot(self.plan, self.primary)["nics"][0]
        return nic

    def checkpoint(self) -> float:
        """Returns how long it took, in seconds."""
        began = time.monotonic()
        services.checkpoint(self.plan, self.primary)
        return time.monotonic() - began

    def reconfigure(self, pair_changes: str) -> None:
        """Changes the primary's file and has it read again."""
        services.configure(self.plan, self.primary, pair_changes=pair_changes, primary=self.primary)
        log = services.directory(self.plan, self.primary) / services.LOG
        before = log.read_text().count(RELOADED)
        self.running[self.primary].send_signal(signal.SIGHUP)
        until(lambda: log.read_text().count(RELOADED) > before, "the changed file is taken")

    def commits(self) -> int:
        """Checkpoints that the primary's service has made."""
        return sum(self.pair(self.primary)["checkpoints"].values())

    def lose_the_primary(self, history: History) -> None:
        """Its host loses its power, the other one takes over, and every client is answered again."""
        history.gap()
        services.switch_off(self.plan, self.primary)
        before = [client.record.answers for client in history.clients]
        until(lambda: self.pair(self.secondary).get("state") == "promoted", "the secondary is promoted")
        # One answer may have been on its way, the next one is of the new guest.
        until(
            lambda: (
                bool(history.broken)
                or all(c.record.answers > old + 1 for c, old in zip(history.clients, before, strict=True))
            ),
            "every client is answered again",
        )
        assert history.broken == []
        self.gaps.append(history.gap())

    def protect_again(self) -> None:
        """The host that was lost comes back, as the secondary of the one that took over."""
        survivor = self.secondary
        services.power_on(self.plan, self.primary)
        services.protect_again(self.plan, self.running, survivor)
        self.primary = survivor

    def nothing_has_grown(self, before: Amounts) -> None:
        """Returns when that is so; the moment of a checkpoint has a machine and some descriptors more."""
        deadline = time.monotonic() + SOON
        while grown := self.amounts().exceeds(before):
            assert time.monotonic() < deadline, ", ".join(grown)
            time.sleep(0.1)

    def amounts_with_a_standby(self) -> Amounts:
        """When the next standby is being filled: it has a process, a thread and descriptors, and takes a moment to come."""
        until(lambda: self.amounts().machines == MACHINES, "the next standby")
        before, deadline = self.amounts(), time.monotonic() + SOON
        while True:
            time.sleep(1)
            now = self.amounts()
            if replace(now, slots=before.slots) == before and now.machines == MACHINES:
                return now
            assert time.monotonic() < deadline, f"it never comes to rest: {now}"
            before = now

    def amounts(self) -> Amounts:
        pids = [process.pid for process in self.running.values()]
        slots = services.snapshot(self.plan, self.primary)["slots"]
        return Amounts(
            machines=sum(len(machine.running(self.plan, host)) for host in HOSTS),
            descriptors=sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids),
            threads=sum(len(os.listdir(f"/proc/{pid}/task")) for pid in pids),
            slots=int(slots["total"] - slots["free"]),
            devices=sum(len(Path(f"/proc/{pid}/net/dev").read_text().splitlines()) for pid in pids),
            files=sum(1 for _ in self.plan.run_dir.rglob("*")),
        )


@contextmanager
def virtual_lab(protected: bool = True) -> Iterator[VirtualLab]:
    """One of its own for a test; skips where a piece is missing. Nothing of it may outlive the test."""
    missing = [tool for tool in needs.VIRTUAL if shutil.which(tool) is None]
    if missing or image.find_kernel() is None:
        pytest.skip(f"{', '.join(missing) or 'the cloud kernel'} missing: run deploy/install-deps.sh lab")
    plan = LabPlan(new_name(), "qemu", service=True, peer_timeout_ms=PEER_TIMEOUT_MS)
    running: services.Running = {}
    with commands.temporary(plan, lambda plan: running.update(services.bring_up(plan, protected))):
        yield VirtualLab(plan, running)
    assert guests.end_all(plan) == 0


def until(condition: Callable[[], object], what: str, timeout: float = SOON) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"not in {timeout} s: {what}"
        time.sleep(0.02)
