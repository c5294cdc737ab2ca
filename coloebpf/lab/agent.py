"""A small process beside each lab that does what the service does on a real host, until that service exists.

It drains both hosts' events into a file, has idle flows and late packets looked for, and sends what has become
releasable while no packet came by to carry it. It takes no decision: nothing here asks for a checkpoint.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from coloebpf.lab.plan import HOSTS, LabPlan
from coloebpf.lab.state import EVENT_FILE
from coloebpf.netns import inside

PERIOD = 0.05  # seconds between two looks at a host
MAX_LOG_BYTES = 1 << 20  # of events.jsonl; it then becomes events.jsonl.1


class HostControl(Protocol):
    """The part of coloebpf.control.Control that the agent needs."""

    def events(self, timeout_s: float) -> list[dict[str, Any]]: ...

    def sweep(self) -> None: ...

    def kick(self) -> object: ...


class EventLog:
    """A file of JSON lines that keeps the newest events in bounded space."""

    def __init__(self, path: Path, limit: int = MAX_LOG_BYTES) -> None:
        self._path = path
        self._limit = limit

    def write(self, events: list[dict[str, Any]]) -> None:
        if not events:
            return
        with open(self._path, "a", encoding="utf-8") as log:
            log.write("".join(json.dumps(event) + "\n" for event in events))
            size = log.tell()
        if size > self._limit:
            self._path.replace(self._path.with_name(self._path.name + ".1"))


def run(plan: LabPlan, open_control: Callable[[Path], HostControl], period: float = PERIOD) -> None:
    """Serve both hosts until the lab is gone."""
    controls: dict[str, HostControl] = {}
    for host in HOSTS:
        with inside(plan.namespace(host)):
            controls[host] = open_control(plan.pin_dir(host))
    log = EventLog(plan.run_dir / EVENT_FILE)
    while plan.run_dir.exists():
        for host, control in controls.items():
            # Inside, because what `kick` sends is sent to a device of the namespace that asks for it.
            with inside(plan.namespace(host)):
                log.write(serve(host, control))
        time.sleep(period)


def serve(host: str, control: HostControl, now: Callable[[], float] = time.time) -> list[dict[str, Any]]:
    """One look at one host; returns its new events."""
    control.sweep()
    events = control.events(0)
    if any(event["kind"] == "kick" for event in events):
        control.kick()
    return [{"time": now(), "host": host, **event} for event in events]
