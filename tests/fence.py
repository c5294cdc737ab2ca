"""Waiting for packets that are in some CPU's queue. A time in which nothing moves proves nothing: a virtual CPU can stand still for long."""

from __future__ import annotations

import os
import time
from functools import cache
from pathlib import Path

PAUSE_S = 0.0005


def pass_all_cpus() -> None:
    """Returns when each CPU has done what its queues of packets held: each packet is at least one step further.

    A CPU serves them before it goes on with a process. What it leaves to ksoftirqd is waited for.
    """
    home = os.sched_getaffinity(0)
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # a busy CPU would let this thread wait for its turn
    try:
        for cpu in home:
            os.sched_setaffinity(0, {cpu})
    finally:
        os.sched_setaffinity(0, home)
        os.sched_setscheduler(0, policy, param)
    while any(runs(path) for path in ksoftirqds()):
        time.sleep(PAUSE_S)


@cache
def ksoftirqds() -> list[Path]:
    """The `stat` of each CPU's."""
    return [
        path.parent / "stat" for path in Path("/proc").glob("[0-9]*/comm") if path.read_text().startswith("ksoftirqd/")
    ]


def runs(stat: Path) -> bool:
    return stat.read_text().rpartition(") ")[2].startswith("R")
