"""Labs for tests: each has a name of its own and is gone afterwards, whatever the test did."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from coloebpf.lab import commands, redis, services
from coloebpf.lab.plan import LabPlan
from tests.lab.service_lab import PATIENT_MS, ServiceLab
from tests.lab.talk import KINDS, Talk
from tests.lab.wire import Wire

_numbers = itertools.count()
CLI = (sys.executable, "-m", "coloebpf")
UP_TIMEOUT = 280  # seconds; two compiles, on a machine that may do other things


@dataclass(frozen=True)
class Lab:
    """A running lab, driven through the command line."""

    plan: LabPlan
    record: dict[str, Any]

    def run(self, node: str, *command: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
        """Run a command on a node to its end."""
        return coloebpf("lab", "exec", "--name", self.plan.name, node, "--", *command, timeout=timeout)

    def start(self, node: str, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command on a node."""
        return subprocess.Popen([*CLI, "lab", "exec", "--name", self.plan.name, node, "--", *command], **options)

    def status(self) -> dict[str, Any]:
        return self._json("status")

    def checkpoint(self) -> dict[str, Any]:
        return self._json("checkpoint")

    def nic(self, number: int = 0) -> dict[str, Any]:
        """The primary's counters of one NIC."""
        return next(nic for nic in self.status()["nics"] if nic["nic"] == number)

    def events(self) -> list[dict[str, Any]]:
        path = Path(self.record["events"])
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def _json(self, command: str) -> dict[str, Any]:
        done = coloebpf("lab", command, "--name", self.plan.name, "--json")
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result


LabMaker = Callable[..., Lab]


def coloebpf(*arguments: str, timeout: float = UP_TIMEOUT) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    return subprocess.run([*CLI, *arguments], capture_output=True, text=True, timeout=timeout, check=False)


def new_name() -> str:
    return f"t{os.getpid()}-{next(_numbers)}"


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.skip("labs need root")


@pytest.fixture
def lab_name() -> Iterator[str]:
    """A name that no other lab has; what a test makes by that name is removed."""
    name = new_name()
    yield name
    commands.down(LabPlan(name))


@pytest.fixture
def wires() -> Iterator[Callable[..., LabPlan]]:
    """Makes labs without a dataplane: `wires(guests="process", nics=2)` returns the plan of one that is up."""
    made: list[LabPlan] = []

    def make(**wanted: Any) -> LabPlan:
        plan = LabPlan(new_name(), **wanted)
        made.append(plan)
        commands.up(plan, None)
        return plan

    yield make
    for plan in made:
        commands.down(plan)


def _maker() -> Iterator[LabMaker]:
    made: list[LabPlan] = []

    def make(
        guests: str = "none",
        nics: int = 1,
        vlan: bool = False,
        mtu: int = 1500,
        command: Sequence[str] = (),
        how: Sequence[str] = ("--bare",),
    ) -> Lab:
        plan = LabPlan(new_name(), guests, nics, vlan, mtu, tuple(command), service="--bare" not in how)
        made.append(plan)
        options = ["--guests", guests, "--nics", str(nics), "--mtu", str(mtu), *(["--vlan"] if vlan else [])]
        tail = ["--", *command] if command else []
        done = coloebpf("lab", "up", *how, "--name", plan.name, "--json", *options, *tail)
        assert done.returncode == 0, done.stderr
        return Lab(plan, json.loads(done.stdout))

    try:
        yield make
    finally:
        for plan in made:
            commands.down(plan)


@pytest.fixture
def make_lab() -> Iterator[LabMaker]:
    """Makes labs with the dataplane, for one test."""
    yield from _maker()


@pytest.fixture(scope="module")
def make_module_lab() -> Iterator[LabMaker]:
    """Makes labs with the dataplane, for the tests of one module."""
    yield from _maker()


@pytest.fixture(scope="session")
def bare_lab() -> Iterator[Lab]:
    """Ports without a stack: what a test sends on pvm's eth0 is PVM output. One for all modules: to load one takes a quarter of a minute."""
    for make in _maker():
        yield make(guests="none")


def begin(wire: Wire) -> None:
    """As new, and the switch knows where the guest is."""
    wire.reset()
    wire.pvm(Talk(wire).tcp(1))
    wire.clean()


@pytest.fixture(scope="module")
def wire(bare_lab: Lab) -> Iterator[Wire]:
    """The ports of the bare lab, as new for each module."""
    with closing(Wire(bare_lab.plan)) as wire:
        begin(wire)
        yield wire


@pytest.fixture(params=KINDS)
def talk(request: pytest.FixtureRequest, wire: Wire) -> Talk:
    """A conversation of each kind of frames."""
    return Talk(wire, **KINDS[request.param])


@pytest.fixture(scope="module")
def process_lab(make_module_lab: LabMaker) -> Lab:
    """Guests with addresses, in which a test starts its servers itself."""
    return make_module_lab(guests="process")


@contextmanager
def service_lab() -> Iterator[ServiceLab]:
    """Services on both hosts, redis in both guests."""
    plan = LabPlan(new_name(), "process", command=redis.SERVER, service=True, peer_timeout_ms=PATIENT_MS)
    try:
        commands.up(plan, services.bring_up)
        yield ServiceLab(plan)
    finally:
        commands.down(plan)


@pytest.fixture(scope="session")
def _services() -> Iterator[ServiceLab]:
    with service_lab() as lab:
        yield lab


@pytest.fixture
def lab(_services: ServiceLab) -> Iterator[ServiceLab]:
    """A lab with services and redis in its guests; a test begins with its fresh()."""
    yield _services
    _services.leave()
