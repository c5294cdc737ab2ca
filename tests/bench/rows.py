"""What is kept of the runs: the rows of the report, and how several runs make one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from tests.bench.feeder import Run
from tests.bench.workloads import Pace, Workload

QUIET_CORES = 0.12  # a run counts as quiet when other processes took at most so much CPU meanwhile


@dataclass(frozen=True)
class Throughput:
    """Closed loop: the best rate and the lowest CPU of several runs."""

    system: str
    workload: str
    order: str
    pps: float
    busy_us: float  # CPU of the whole machine per released frame, the feeder's included
    released: int
    reordered: int
    lost: int
    duplicates: int
    notified: int  # checkpoints that colo-compare asked for
    stalled: int  # runs that came to a halt
    runs: int
    other_cores: float  # of the noisiest run that was used
    cpu_us: float | None = None  # CPU of the compared thing alone, per released frame
    hooks: Mapping[str, Hook] = field(default_factory=dict)


@dataclass(frozen=True)
class Hook:
    """One program under the lab's traffic, by the kernel's accounting; the accounting's own cost is taken off."""

    ns_per_packet: float
    runs_per_packet: float


@dataclass(frozen=True)
class Latency:
    """Open loop: from the later of a frame's two writes to its reading at the client."""

    system: str
    workload: str
    pace: str
    p50_us: float
    p90_us: float
    p99_us: float
    min_us: float
    lost: int
    reordered: int
    notified: int


def quiet_runs(once: Callable[[], Run], repeat: int) -> list[Run]:
    """`repeat` runs on a quiet machine; noisy ones are repeated, three times as many at most, and used if all are."""
    runs: list[Run] = []
    quiet: list[Run] = []
    while len(quiet) < repeat and len(runs) < 3 * repeat:
        runs.append(once())
        if runs[-1].other_cores <= QUIET_CORES:
            quiet.append(runs[-1])
    return quiet or runs


def throughput(
    system: str,
    workload: Workload,
    order: str,
    runs: Iterable[Run],
    *,
    cpu_us: float | None = None,
    hooks: Mapping[str, Hook] | None = None,
) -> Throughput:
    """The row that several runs make."""
    runs = list(runs)
    whole = [run for run in runs if not run.stalled]
    return Throughput(
        system=system,
        workload=workload.name,
        order=order,
        pps=max((run.pps for run in whole), default=0.0),
        busy_us=min((run.busy_us for run in whole), default=0.0),
        released=_total(runs, "sent") - _total(runs, "lost"),
        reordered=_total(runs, "reordered"),
        lost=_total(runs, "lost"),
        duplicates=_total(runs, "duplicates"),
        notified=_total(runs, "notified"),
        stalled=len(runs) - len(whole),
        runs=len(runs),
        other_cores=max(run.other_cores for run in runs),
        cpu_us=cpu_us,
        hooks=hooks or {},
    )


def hooks_of(run: Run, floor_ns: float) -> dict[str, Hook]:
    """Per released frame, what each metered program took in this run."""
    names = {key.removesuffix("_runs") for key in run.meters if key.endswith("_runs")}
    packets = max(1, run.packets)
    return {
        name: Hook(
            ns_per_packet=(run.meters[f"{name}_ns"] - floor_ns * run.meters[f"{name}_runs"]) / packets,
            runs_per_packet=run.meters[f"{name}_runs"] / packets,
        )
        for name in sorted(names)
    }


def latency(system: str, workload: Workload, pace: Pace, runs: Iterable[Run]) -> Latency:
    """The row of the run with the lowest median; losses and reordering are summed over all."""
    runs = list(runs)
    best = min(runs, key=lambda run: (run.counts["lost"] > 0, run.counts["p50_us"])).counts
    return Latency(
        system=system,
        workload=workload.name,
        pace=pace.name,
        p50_us=best["p50_us"],
        p90_us=best["p90_us"],
        p99_us=best["p99_us"],
        min_us=best["min_us"],
        lost=_total(runs, "lost"),
        reordered=_total(runs, "reordered"),
        notified=_total(runs, "notified"),
    )


def _total(runs: list[Run], count: str) -> int:
    return sum(int(run.counts[count]) for run in runs)


@dataclass(frozen=True)
class TestRun:
    """BPF_PROG_TEST_RUN: mean of one hook over prepared frames."""

    __test__ = False  # not one of pytest's

    hook: str
    kind: str  # of frame, and how many flows
    ns: float
