"""The runs: every workload and order through the plain bridge, colo-compare and the lab, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from tests.bench import progstats
from tests.bench.colo_compare import ColoCompare
from tests.bench.feeder import Feeder, Run
from tests.bench.lab import BenchLab
from tests.bench.rows import Hook, Latency, Throughput, hooks_of, latency, quiet_runs, throughput
from tests.bench.workloads import LOCK_STEP, Order, Pace, Workload

BRIDGE = "plain bridge"
BRIDGE_BOTH = "plain bridge, both guests send"
PEER = "colo-compare"
LAB = "coloebpf"
NO_STEERING = "0"
PEER_WINDOWS = (
    320,
    900,
)  # frames in flight; which one suits colo-compare differs between workloads, it gets the better
COMPARING = ("P2", "P4")  # the hooks that do what colo-compare does


NewLab = Callable[[], AbstractContextManager[BenchLab]]


@dataclass(frozen=True)
class Effort:
    """How long each run measures, and how many runs make a row."""

    seconds: float
    repeat: int


FULL = Effort(2.0, 3)
QUICK = Effort(0.7, 1)


class Suite:
    """Both topologies are up all the time and take turns, so that a change of the machine's mood favours none."""

    def __init__(self, feeder: Feeder, plain: BenchLab, lab: BenchLab, new_lab: NewLab, effort: Effort) -> None:
        """`plain` has no programs."""
        self._feeder = feeder
        self._plain = plain
        self._lab = lab
        self._new_lab = new_lab
        self._effort = effort
        self.floor_ns = progstats.floor_ns()

    def bridge(self, workload: Workload) -> Iterator[Throughput]:
        """The primary's frames alone, which is what a bridge without coloebpf carries; then both guests'."""
        runs: list[Run] = []
        # The better of two: as it comes, and steered like the lab's vif.
        for cpus in dict.fromkeys((NO_STEERING, self._lab.steering)):
            self._plain.steering = cpus
            runs += self._quiet(partial(self._closed, self._plain, workload, LOCK_STEP, secondary=False))
        self._plain.steering = NO_STEERING
        yield throughput(BRIDGE, workload, "primary alone", runs)
        runs = self._quiet(partial(self._closed, self._plain, workload, LOCK_STEP))
        yield throughput(BRIDGE_BOTH, workload, LOCK_STEP.name, runs)

    def peer(self, workload: Workload, order: Order) -> Throughput:
        """QEMU's colo-compare; its CPU is that of QEMU's process alone, without the feeder's side of the sockets."""
        runs: list[Run] = []
        for window in PEER_WINDOWS:
            runs += self._quiet(partial(self._closed_peer, workload, order, window))
        cpu = [run.meters["cpu_ns"] / 1e3 / run.packets for run in runs if not run.stalled]
        return throughput(PEER, workload, order.name, runs, cpu_us=min(cpu, default=None))

    def lab(self, workload: Workload, order: Order) -> Throughput:
        """Through the lab: rates without the kernel's accounting on, the hooks' CPU with it."""
        return self._through(lambda: nullcontext(self._lab), workload, order)

    def many(self, workload: Workload, order: Order) -> Throughput:
        """The same, each run in a lab of its own: connections stay in the flow table for days, and would fill it for the runs that follow."""
        return self._through(self._new_lab, workload, order)

    def _through(self, labs: NewLab, workload: Workload, order: Order) -> Throughput:
        runs: list[Run] = []
        for two_threads in (False, True):
            runs += self._quiet(partial(self._closed_in, labs, workload, order, two_threads=two_threads))
        with progstats.counting():
            metered = self._quiet(partial(self._closed_in, labs, workload, order, metered=True))
        # A halted run has no figures of its own, but the row shows that it halted.
        measured = [run for run in metered if not run.stalled] or metered
        hooks = min((hooks_of(run, self.floor_ns) for run in measured), key=_comparing_ns)
        return throughput(LAB, workload, order.name, runs, cpu_us=_comparing_ns(hooks) / 1e3, hooks=hooks)

    def latencies(self, workload: Workload, pace: Pace) -> Iterator[Latency]:
        """All three, one after the other."""
        repeat, seconds = range(self._effort.repeat), self._effort.seconds
        alone = self._plain.ports().without_secondary()
        yield latency(
            BRIDGE, workload, pace, [self._feeder.paced(alone, workload, pace, seconds=seconds) for _ in repeat]
        )
        runs = []
        for _ in repeat:
            with self._new_peer() as peer:
                runs.append(self._feeder.paced(peer.ports(), workload, pace, seconds=seconds))
        yield latency(PEER, workload, pace, runs)
        ports = self._lab.ports()
        yield latency(LAB, workload, pace, [self._feeder.paced(ports, workload, pace, seconds=seconds) for _ in repeat])

    def _quiet(self, once: Callable[[], Run]) -> list[Run]:
        return quiet_runs(once, self._effort.repeat)

    def _closed_in(self, labs: NewLab, workload: Workload, order: Order, **how: bool) -> Run:
        with labs() as lab:
            run = self._closed(lab, workload, order, **how)
            lab.check()
            return run

    def _closed(
        self,
        lab: BenchLab,
        workload: Workload,
        order: Order,
        *,
        secondary: bool = True,
        two_threads: bool = False,
        metered: bool = False,
    ) -> Run:
        ports = lab.ports() if secondary else lab.ports().without_secondary()
        meter = partial(progstats.meter, {**lab.programs("primary"), **lab.programs("secondary")}) if metered else None
        return self._feeder.closed(
            ports, workload, order, seconds=self._effort.seconds, two_threads=two_threads, meter=meter
        )

    def _closed_peer(self, workload: Workload, order: Order, window: int) -> Run:
        with self._new_peer() as peer:
            return self._feeder.closed(
                peer.ports(), workload, order, seconds=self._effort.seconds, window=window, meter=peer.meter
            )

    def _new_peer(self) -> ColoCompare:
        ports = self._lab.ports()
        return ColoCompare(ports.guest_mac, ports.client_mac)


def _comparing_ns(hooks: Mapping[str, Hook]) -> float:
    return sum(hooks[name].ns_per_packet for name in COMPARING)
