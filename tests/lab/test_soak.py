"""A long run with churn: what it needs in the end is what it needed after its first quarter, and nothing is left over.

`make test` runs two minutes of it, `make soak` 20 (COLO_SOAK_S: seconds).
"""

from __future__ import annotations

import ctypes as ct
import os
import random
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from coloebpf import bpfsys, pins
from coloebpf.control import Control
from coloebpf.errors import ColoError
from coloebpf.lab.plan import GUESTS, HOSTS
from tests.lab.churn import Churner
from tests.lab.conftest import service_lab
from tests.lab.probe import Probe
from tests.lab.service_lab import Counter, ServiceLab, until
from tests.lab.speakers import Speakers

pytestmark = [pytest.mark.lab, pytest.mark.slow]
DURATION_S = float(os.environ.get("COLO_SOAK_S", "120"))
SEED = int(os.environ.get("COLO_SOAK_SEED", "0")) or random.randrange(1, 1 << 32)
CHURNERS = 4
CHECKPOINT_S = 0.3
PROBE_S = 1.0
COPY_MS = 50
SAMPLE_S = 0.5
KIND_TCP = 1  # bpf/types.h
# Of the medians of the second and the last quarter; the first is warming up. An interpreter's memory moves in pieces:
# a new arena of its allocator is 1 MiB, one of malloc's for a thread that happened to be new some 100 KiB.
TOLERANCE_KIB = 1536
IDLE_S = 150.0  # more than the time until flows of connections that ended (10 s), datagrams (30 s) and half-open ones (60 s) are forgotten


@pytest.fixture
def lab() -> Iterator[ServiceLab]:
    """One of its own, so that what is left over is the churn's."""
    with service_lab() as lab:
        yield lab
        lab.leave()


@dataclass
class Samples:
    """Of one host. `rss_kib`: the service's memory; `maps_kib`: that of all its maps; `flows`, `slots`: in use."""

    rss_kib: list[int] = field(default_factory=list)
    maps_kib: list[int] = field(default_factory=list)
    flows: list[int] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)

    def take(self, lab: ServiceLab, host: str) -> None:
        with Control.open(lab.plan.pin_dir(host)) as control:
            flows, slots = in_use(control)
            self.maps_kib.append(maps_kib(control))
        self.rss_kib.append(_field(Path(f"/proc/{lab.running[host].pid}/status"), "VmRSS"))
        self.flows.append(flows)
        self.slots.append(slots)

    def growth_kib(self) -> float:
        """Of the service's memory, from the second quarter to the last."""
        quarter = len(self.rss_kib) // 4
        return statistics.median(self.rss_kib[-quarter:]) - statistics.median(self.rss_kib[quarter : 2 * quarter])


def maps_kib(control: Control) -> int:
    """What the kernel charges for all maps of a host."""
    return sum(_field(Path(f"/proc/self/fdinfo/{control.fd(name)}"), "memlock") for name in pins.MAPS) // 1024


def _field(path: Path, name: str) -> int:
    """A number of a file of lines such as `name: number kB`."""
    line = next(line for line in path.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1])


def in_use(control: Control) -> tuple[int, int]:
    """Flows (on the secondary each has a translation) and slots."""
    shot = control.snapshot()
    flows, slots = (shot[what]["total"] - shot[what]["free"] for what in ("flows", "slots"))
    return flows, slots


def alive(lab: ServiceLab) -> set[int]:
    """Ports of the client's whose connection a guest still has. Such a flow is in use: a VM that is no copy may be left with one that the other has ended,
    if it has missed a reset, and says its last word again for minutes."""
    ports = set()
    for guest in GUESTS:
        command = ["ip", "netns", "exec", lab.plan.namespace(guest), "ss", "-Htan"]
        rows = [
            line.split()
            for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        ]
        ports |= {int(row[4].rpartition(":")[2]) for row in rows if row[0] not in ("LISTEN", "TIME-WAIT")}
    return ports


def left_over(control: Control, spared: set[int]) -> list[str]:
    """The flows that are not gone but for ports: client's port, flags (FLOW_* of bpf/types.h), seconds since their last packet."""
    total, found = control.snapshot()["flows"]["total"], []
    for number in range(total):
        flow = control.shapes.leaf("flows")()
        if not bpfsys.lookup(control.fd("flows"), ct.c_uint32(number), flow):
            break
        if flow.flags & 1 and not (flow.key.kind == KIND_TCP and socket.ntohs(flow.key.remote_port) in spared):
            idle = (time.monotonic_ns() - flow.last_ns) / 1e9
            found.append(
                f"port {socket.ntohs(flow.key.remote_port)}, flags {flow.flags:#x}, idle {idle:.0f} s, "
                f"held {flow.p_count}, parked {flow.s_count}, in flight {flow.in_flight}, owner {flow.owner}"
            )
    return found


def failed(*clients: Counter | Churner) -> list[str]:
    """What went wrong so far."""
    return [client.wrong or client.broken for client in clients if client.wrong or client.broken]


@contextmanager
def checkpoints(lab: ServiceLab) -> Iterator[None]:
    """One after the other, but for a pause."""
    ended = threading.Event()

    def order() -> None:
        while not ended.wait(CHECKPOINT_S):
            with suppress(ColoError, OSError):
                lab.checkpoint()

    ordering = threading.Thread(target=order, daemon=True)
    ordering.start()
    try:
        yield
    finally:
        ended.set()
        ordering.join()


@pytest.mark.timeout(DURATION_S + 300)
def test_given_churn_and_checkpoints_for_long_then_memory_is_flat_and_nothing_is_left_over(
    lab: ServiceLab, capsys: pytest.CaptureFixture[str]
) -> None:
    client = lab.fresh(copy_ms=COPY_MS)
    samples = {host: Samples() for host in HOSTS}
    watch, probe = Speakers(lab.plan), Probe(lab, PROBE_S)
    churners = [Churner(lab, number, random.Random(f"{SEED} {number}")) for number in range(CHURNERS)]
    try:
        with checkpoints(lab):
            end = time.monotonic() + DURATION_S
            while time.monotonic() < end and not failed(client, *churners):
                for host, sample in samples.items():
                    sample.take(lab, host)
                time.sleep(SAMPLE_S)
    finally:
        for churner in churners:
            churner.finish()
        probe.finish()
        watch.stop()
    with capsys.disabled():
        print(f"\n  soak of {DURATION_S:.0f} s, COLO_SOAK_SEED={SEED}")
        print(
            f"  {sum(c.connections for c in churners)} connections, {sum(c.answers for c in churners)} answers, "
            f"{client.count} counts, {probe.answers} answers that differed, epoch {lab.pair('primary')['epoch']}"
        )
        for host, sample in samples.items():
            print(
                f"  {host}: RSS {sample.rss_kib[0]} to {sample.rss_kib[-1]} KiB, growth {sample.growth_kib():.0f} KiB; "
                f"maps {sample.maps_kib[0]} to {sample.maps_kib[-1]} KiB; at most {max(sample.flows)} flows, {max(sample.slots)} slots"
            )
    assert not failed(client, *churners), f"COLO_SOAK_SEED={SEED}"
    client.goes_on()
    probe.check()
    watch.check()
    assert probe.answers
    for host, sample in samples.items():
        assert sample.growth_kib() <= TOLERANCE_KIB, f"the {host}'s service grows"
        assert len(set(sample.maps_kib)) == 1, f"the {host}'s maps grow"
    client.finish()
    lab.counter = None
    for host in HOSTS:
        with Control.open(lab.plan.pin_dir(host)) as control:
            until(lambda c=control: in_use(c)[1] == 0, f"the {host} has all slots back")  # type: ignore[misc]
            end = time.monotonic() + IDLE_S
            while in_use(control)[0] and (left := left_over(control, alive(lab))):
                assert time.monotonic() < end, f"the {host} has flows left over: {left}"
                time.sleep(SAMPLE_S)
            until(lambda c=control: in_use(c)[0] == len(left_over(c, set())), f"the {host}'s gauge of flows is right")  # type: ignore[misc]
