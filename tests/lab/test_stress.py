"""Both CPUs at once: the PVM's and the SVM's packets of one flow from two threads, random leads in both directions.

Every packet is released exactly once, in order per flow, without anybody's help (no kick), and every slot comes back.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from coloebpf.control import Control
from tests.bench.feeder import Feeder
from tests.bench.lab import BenchLab, bring_up
from tests.bench.workloads import Order, Workload

pytestmark = pytest.mark.lab

LATE = ("missing_on_svm", "missing_on_pvm")  # a thread that waited for a CPU: no difference between the two
PACKETS = int(os.environ.get("COLO_STRESS_PACKETS", "1_000_000"))
ROUND_S = 4.0  # of one mix of flows, sizes and leads
WINDOW = 240  # frames not released yet: fewer than the 256 that veth's ring has, which drops what comes while softirq waits for a CPU
SEED = int(os.environ.get("COLO_STRESS_SEED", str(time.time_ns() & 0xFFFFFFFF)))


@pytest.mark.timeout(1200)
def test_two_cpus_random_leads(tmp_path: Path) -> None:
    dice = random.Random(SEED)
    sent = 0
    with BenchLab("stress", bring_up) as lab:
        feeder, ports = Feeder(tmp_path), lab.ports()
        control = Control.open(lab.plan.pin_dir("primary"))
        while sent < PACKETS:
            tcp = dice.random() < 0.5
            work = Workload("stress", tcp, dice.choice((22, 100, 700, 1448)), dice.choice((1, 2, 64, 1000)))
            batch = dice.choice((1, 4, 8, 16))
            # The feeder keeps distances of whole batches; a lead of 0 is a batch each in turn.
            order = Order(
                "random", dice.choice((1, -1)) * batch * dice.choice((1, 2, 5, 12)) if dice.random() < 0.8 else 0, batch
            )
            run = feeder.closed(ports, work, order, seconds=ROUND_S, window=WINDOW, two_threads=dice.random() < 0.8)
            what = f"seed {SEED}, after {sent:,} packets: {work}, {order}: {dict(run.counts)}; dropped by devices: {lab.dropped()}"
            assert not lab.dropped(), f"the machine lost frames, not the dataplane; {what}"
            assert not run.counts["lost"], what
            assert not run.counts["duplicates"], what
            assert not run.counts["reordered"], what
            assert run.packets, what
            sent += int(run.counts["sent"])
        seen = control.snapshot()
    nic = seen["nics"][0]
    assert nic["output_packets"] == nic["released_packets"] >= PACKETS
    assert nic["held"] == nic["parked"] == 0
    assert seen["slots"]["free"] == seen["slots"]["total"]
    assert nic["kicks"] == 0, "a release needed user space: a wake-up was lost"
    differ = {reason: count for reason, count in nic["divergences"].items() if count and reason not in LATE}
    assert not differ
    assert not any(nic["dropped"].values()), nic["dropped"]
