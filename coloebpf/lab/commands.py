"""What `coloebpf lab` does: up, down, exec, status, checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any, NoReturn

from coloebpf.errors import LabError
from coloebpf.lab import guests, machine, state, topology
from coloebpf.lab.loaders import INTERRUPTIONS, held_back
from coloebpf.lab.plan import GUESTS, HOSTS, PAIR, LabPlan
from coloebpf.netns import inside

BringUp = Callable[[LabPlan], object]
Snapshot = Callable[[LabPlan, str], dict[str, Any]]
Service = Callable[[LabPlan, str], dict[str, Any] | None]


def up(plan: LabPlan, bring_up: BringUp | None) -> dict[str, Any]:
    """Make the lab and return its record. What fails or is interrupted is taken down again.

    `bring_up` puts the dataplane into both hosts; without it the hosts are plain bridges.
    """
    with _claimed(plan, always=False):
        return _make(plan, bring_up)


@contextmanager
def temporary(plan: LabPlan, bring_up: BringUp | None) -> Iterator[dict[str, Any]]:
    """Make the lab for the body's time."""
    with _claimed(plan, always=True):
        yield _make(plan, bring_up)


def _make(plan: LabPlan, bring_up: BringUp | None) -> dict[str, Any]:
    # pyroute2 works with helper processes and callbacks, which an exception out of a signal's handler would end in, or
    # get lost in.
    with held_back(INTERRUPTIONS):
        topology.build(plan)
    if bring_up:
        bring_up(plan)
    with held_back(INTERRUPTIONS):
        topology.wake_guests(plan)
    record = state.save(plan)
    if bring_up and not plan.service:
        _start_agent(plan)
    if plan.command:
        guests.start(plan)
    return record


def down(plan: LabPlan) -> bool:
    """Remove what there is of the lab, by name, whoever made it and how far they got; False if there was nothing."""
    found = plan.run_dir.exists() or plan.pin_base.exists()
    guests.end(guests.with_arguments(agent_arguments(plan)))
    guests.end_all(plan)
    found = bool(topology.remove(plan)) or found
    state.release(plan)
    return found


def execute(plan: LabPlan, node: str, command: list[str]) -> NoReturn:
    """Become `command` inside the node's network namespace, with this process's own mounts."""
    plan = state.load(plan)
    if node not in plan.nodes:
        raise LabError(f"{node} is a virtual machine, which has no namespace here; ask it from the client")
    with inside(plan.namespace(node)):
        sys.stdout.flush()
        try:
            os.execvp(command[0], command)
        except OSError as error:
            raise LabError(f"can't run {command[0]} on {node}: {error.strerror}") from error


def status(plan: LabPlan, snapshot: Snapshot, service: Service | None = None) -> dict[str, Any]:
    """State, epoch and counters: the primary's at the top, since it compares, and the secondary's beside.

    `service`: what a host's own says of itself.
    """
    plan = state.load(plan)
    primary = snapshot(plan, "primary")
    pair = next(entry for entry in primary.pop("pairs") if entry["pair"] == PAIR)
    return {
        "name": plan.name,
        "guests": plan.guests,
        "processes": {guest: guests.running(plan, guest) for guest in GUESTS if guest in plan.nodes},
        "machines": {host: machine.running(plan, host) for host in HOSTS},
        "agent": bool(guests.with_arguments(agent_arguments(plan))),
        "services": {host: service(plan, host) for host in HOSTS} if service else {},
        "state": pair["state"],
        "epoch": pair["epoch"],
        **primary,
        "secondary": snapshot(plan, "secondary"),
    }


def agent_arguments(plan: LabPlan) -> list[str]:
    return ["lab", "agent", "--name", plan.name]


def _start_agent(plan: LabPlan) -> None:
    with open(plan.run_dir / "agent.log", "wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", "coloebpf", *agent_arguments(plan)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # it may not be installed
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


@contextmanager
def _claimed(plan: LabPlan, always: bool) -> Iterator[None]:
    """The name is this process's, and what is made of the lab is taken down; no signal comes between the two."""
    with _interruptible() as interrupted, ExitStack() as stack:
        with held_back(INTERRUPTIONS):
            state.claim(plan)
            stack.enter_context(_taken_down(plan, always))
        yield
        if interrupted():  # and the exception got lost in a callback of a library
            raise KeyboardInterrupt


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C, SIGTERM and a lost terminal end the body; the function given tells whether one of them came."""
    came = False

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal came
        came = True
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in INTERRUPTIONS}
    try:
        yield lambda: came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def _taken_down(plan: LabPlan, always: bool) -> Iterator[None]:
    """Take the lab down after the body, or only if the body raises; a signal doesn't stop the taking down."""
    finished = False
    try:
        yield
        finished = True
    finally:
        if always or not finished:
            for number in INTERRUPTIONS:
                signal.signal(number, signal.SIG_IGN)
            down(plan)
