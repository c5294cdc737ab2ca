"""Compiles and runs feeder.c, and reads what it measured."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench.errors import BenchError
from tests.bench.workloads import Order, Pace, Workload

SOURCES = Path(__file__).parent
DEADLINE_S = 60.0  # for one run; the longest sends for 10 s
FIRST_NET = 64 << 8  # client addresses 10.64.0.x; each run takes the next /24, so that all its flows are new
FEEDER_CPU = 0
OTHER_CPU = 1

Meter = Callable[[], Mapping[str, float]]


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

    def __init__(self, directory: Path, compiler: str = "gcc") -> None:
        """Compiles into `directory`."""
        if shutil.which(compiler) is None:
            raise BenchError(f"{compiler} is missing, and the feeder is written in C: apt-get install gcc libc6-dev")
        self._binary = directory / "feeder"
        self._net = FIRST_NET
        command = [compiler, "-O2", "-Wall", "-Wextra", "-pthread", "-o", str(self._binary), str(SOURCES / "feeder.c")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BenchError(f"feeder.c doesn't compile: {done.stderr.strip()}")

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
        args = _options(seconds=seconds, window=window, lead=order.lead, batch=order.batch)
        if two_threads:
            args += _options(secondary_cpu=OTHER_CPU)
        return self._run(ports, workload, args, meter)

    def paced(self, ports: Ports, workload: Workload, pace: Pace, *, seconds: float) -> Run:
        """A fixed number of frames a second; measures latency."""
        return self._run(ports, workload, _options(seconds=seconds, rate=pace.rate, lag_us=pace.lag_us))

    def _run(self, ports: Ports, workload: Workload, extra: list[str], meter: Meter | None = None) -> Run:
        self._net += 1
        common = _options(payload=workload.payload, flows=workload.flows, net=self._net, cpu=FEEDER_CPU)
        command = [str(self._binary), *ports.arguments(), *common, *extra, *(["--tcp"] if workload.tcp else [])]
        marks: list[Mapping[str, float]] = []
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            last = ""
            for line in process.stdout:
                last = line
                if meter and line.startswith("mark"):
                    marks.append(meter())
            try:
                code = process.wait(DEADLINE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise BenchError(f"the feeder didn't end: {' '.join(command)}") from None
            if code:
                raise BenchError(f"the feeder failed: {process.stderr.read().strip()} ({' '.join(command)})")
        meters = {k: marks[-1][k] - marks[0][k] for k in marks[0]} if len(marks) > 1 else {}
        return Run(json.loads(last), meters)


def _options(**values: float) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]
