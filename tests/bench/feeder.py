"""Compiles and runs feeder.c, and reads what it measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.native import Meter, build, options, run
from tests.bench.workloads import Order, Pace, Workload

FIRST_NET = 64 << 8  # client addresses 10.64.0.x; each run takes the next /24, so that all its flows are new
FEEDER_CPU = 0
OTHER_CPU = 1


@dataclass(frozen=True)
class Ports:
    """Where frames go in and come out: NAMESPACE:DEVICE, or the paths of stream sockets."""

    primary: str
    secondary: str | None
    client: str
    guest_mac: str
    client_mac: str
    stream: bool = False
    notify: str | None = None

    def without_secondary(self) -> Ports:
        """The same with the primary's frames only."""
        return replace(self, secondary=None)

    def arguments(self) -> list[str]:
        """As the feeder takes them."""
        args = ["--pri", self.primary, "--out", self.client]
        args += ["--guest-mac", self.guest_mac, "--client-mac", self.client_mac]
        if self.secondary:
            args += ["--sec", self.secondary]
        if self.notify:
            args += ["--notify", self.notify]
        return args + (["--stream"] if self.stream else [])


@dataclass(frozen=True)
class Run:
    """One run of the feeder: its own counts, and how far the target's meters went while it measured."""

    counts: Mapping[str, Any]
    meters: Mapping[str, float] = field(default_factory=dict)

    @property
    def pps(self) -> float:
        """Frames released a second (closed loop)."""
        return float(self.counts["pps"])

    @property
    def packets(self) -> int:
        """Frames released while it measured (closed loop)."""
        return int(self.counts["packets"])

    @property
    def busy_us(self) -> float:
        """CPU time of the whole machine per released frame (closed loop)."""
        return float(self.counts["busy_s"]) * 1e6 / max(1, self.packets)

    @property
    def other_cores(self) -> float:
        """Cores that foreign processes took meanwhile: user time that isn't the feeder's (closed loop)."""
        other = float(self.counts["user_s"]) - float(self.counts["own_user_s"]) - self.meters.get("user_s", 0.0)
        return max(0.0, other / float(self.counts["seconds"]))

    @property
    def stalled(self) -> bool:
        """It came to a halt, or measured nothing."""
        return bool(self.counts["stalled"]) or not self.packets

    @property
    def clean(self) -> bool:
        """Every frame came, once, in order."""
        return not any(self.counts[k] for k in ("lost", "reordered", "duplicates"))


class Feeder:
    """The compiled feeder; each run gets client addresses that no earlier run had."""

    def __init__(self, directory: Path) -> None:
        """Compiles into `directory`."""
        self._binary = build("feeder", directory)
        self._net = FIRST_NET

    def closed(
        self,
        ports: Ports,
        workload: Workload,
        order: Order,
        *,
        seconds: float,
        window: int = 256,
        two_threads: bool = False,
        meter: Meter | None = None,
    ) -> Run:
        """As many frames as go through, at most `window` of them not yet released."""
        args = options(seconds=seconds, window=window, lead=order.lead, batch=order.batch)
        if two_threads:
            args += options(secondary_cpu=OTHER_CPU)
        return self._run(ports, workload, args, meter)

    def paced(self, ports: Ports, workload: Workload, pace: Pace, *, seconds: float) -> Run:
        """A fixed number of frames a second; measures latency."""
        return self._run(ports, workload, options(seconds=seconds, rate=pace.rate, lag_us=pace.lag_us))

    def _run(self, ports: Ports, workload: Workload, extra: list[str], meter: Meter | None = None) -> Run:
        self._net += 1
        common = options(payload=workload.payload, flows=workload.flows, net=self._net, cpu=FEEDER_CPU)
        command = [str(self._binary), *ports.arguments(), *common, *extra, *(["--tcp"] if workload.tcp else [])]
        line, meters = run(command, meter)
        return Run(json.loads(line), meters)
