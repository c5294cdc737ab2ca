"""Each hook by BPF_PROG_TEST_RUN: frame by frame, in both orders in which the replicas' packets can come."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from coloebpf.netns import inside
from tests.bench import progstats
from tests.bench.feeder import FEEDER_CPU
from tests.bench.lab import BenchLab
from tests.bench.native import build, options, run
from tests.bench.rows import TestRun
from tests.bench.suite import NewLab
from tests.bench.workloads import TCP_MANY, TCP_ONE, UDP_MANY, UDP_ONE, Workload

KINDS = (UDP_ONE, UDP_MANY, TCP_ONE, TCP_MANY)
FIRST_NET = 128 << 8  # client addresses 10.128.0.x and up: none of the feeder's
BASELINE = "an empty program"


@dataclass(frozen=True)
class Step:
    """One program on one device, and who sends the frame that it is shown."""

    program: str
    xdp: bool
    device: str  # "vif" or "fwd"
    sender: str


@dataclass(frozen=True)
class Scenario:
    """Steps that each frame goes through, on one host, and what the programs' figures then mean."""

    host: str
    steps: tuple[Step, ...]
    rows: Mapping[str, str]  # program: row of the report


P2 = Step("P2", False, "vif", "primary")
SVM = Step("P3", True, "fwd", "secondary")  # live frames: what P3 passes comes to P4
SCENARIOS = (
    Scenario("primary", (Step("P1", False, "vif", "client"),), {"P1": "P1"}),
    Scenario("primary", (SVM, P2), {"P2": "P2 finds the proof", "P3": "P3", "P4": "P4 parks"}),
    Scenario("primary", (P2, SVM), {"P2": "P2 holds, and passes on what is released", "P4": "P4 releases"}),
    Scenario("secondary", (Step("S1", True, "fwd", "client"),), {"S1": "S1 (XDP)", "S1 delivery": "S1 (delivery)"}),
    Scenario("secondary", (Step("S2", False, "vif", "secondary"),), {"S2": "S2"}),
    Scenario("secondary", (Step("S3", False, "vif", "client"),), {"S3": "S3"}),
)


class TestRuns:
    """Runs the scenarios on the hosts of a lab."""

    __test__ = False  # not one of pytest's

    def __init__(self, new_lab: NewLab, directory: Path, frames: int) -> None:
        """`frames` are measured for each figure, after each flow had one."""
        self._new_lab = new_lab
        self._frames = frames
        self._binary = build("testrun", directory)
        self._net = FIRST_NET

    def all(self) -> Iterator[TestRun]:
        """Every hook with every kind of frame."""
        for workload in KINDS:
            with (
                self._new_lab() as lab
            ):  # with what only one kind needs of the flow table: a run has up to 100,000 flows
                floor = self._floor(lab, workload)
                yield TestRun(BASELINE, workload.name, floor)
                for scenario in SCENARIOS:
                    yield from self._scenario(lab, scenario, workload, floor)
                lab.check()

    def _scenario(self, lab: BenchLab, scenario: Scenario, workload: Workload, floor: float) -> Iterator[TestRun]:
        programs = lab.programs(scenario.host)
        devices = lab.ifindexes(scenario.host)
        steps = [(step, programs[step.program], devices[step.device]) for step in scenario.steps]
        used = self._run(lab, scenario.host, workload, steps, {name: programs[name] for name in scenario.rows})
        for name, row in scenario.rows.items():
            ns = used[f"{name}_ns"] - floor * used[f"{name}_runs"]
            yield TestRun(row, workload.name, ns / self._frames)

    def _floor(self, lab: BenchLab, workload: Workload) -> float:
        with progstats.empty_program() as fd:
            step = Step("empty", False, "vif", "primary")
            used = self._run(lab, "primary", workload, [(step, fd, lab.ifindexes("primary")["vif"])], {"empty": fd})
        return used["empty_ns"] / used["empty_runs"]

    def _run(
        self,
        lab: BenchLab,
        host: str,
        workload: Workload,
        steps: list[tuple[Step, int, int]],
        programs: Mapping[str, int],
    ) -> dict[str, float]:
        ports = lab.ports()
        self._net += 1
        command = [str(self._binary), "--guest-mac", ports.guest_mac, "--client-mac", ports.client_mac]
        command += options(payload=workload.payload, flows=workload.flows, net=self._net, frames=self._frames)
        command += options(cpu=FEEDER_CPU) + (["--tcp"] if workload.tcp else [])
        for step, fd, ifindex in steps:
            command += ["--step", f"{'xdp' if step.xdp else 'skb'}:{fd}:{ifindex}:{step.sender}"]
        with inside(lab.plan.namespace(host)), progstats.counting():
            fds = [fd for _, fd, _ in steps]
            _, used = run(command, lambda: progstats.meter(programs), pass_fds=fds)
        return used
