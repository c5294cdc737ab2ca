"""What `coloebpf lab` does: up, down, exec, status, checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

from coloebpf.errors import LabError
from coloebpf.lab import guests, state, topology
from coloebpf.lab.plan import GUESTS, PAIR, LabPlan
from coloebpf.netns import inside

BringUp = Callable[[LabPlan], None]
Snapshot = Callable[[LabPlan, str], dict[str, Any]]

INTERRUPTIONS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def up(plan: LabPlan, bring_up: BringUp | None) -> dict[str, Any]:
    """Make the lab and return its record. What fails or is interrupted is taken down again.

    `bring_up` puts the dataplane into both hosts; without it the hosts are plain bridges.
    """
    state.claim(plan)
    with taken_down(plan, always=False):
        topology.build(plan)
        if bring_up:
            bring_up(plan)
        topology.wake_guests(plan)
        record = state.save(plan)
        if bring_up:
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
    with inside(state.load(plan).namespace(node)):
        sys.stdout.flush()
        try:
            os.execvp(command[0], command)
        except OSError as error:
            raise LabError(f"can't run {command[0]} on {node}: {error.strerror}") from error


def status(plan: LabPlan, snapshot: Snapshot) -> dict[str, Any]:
    """State, epoch and counters: the primary's at the top, since it compares, and the secondary's beside."""
    plan = state.load(plan)
    primary = snapshot(plan, "primary")
    pair = next(entry for entry in primary.pop("pairs") if entry["pair"] == PAIR)
    return {
        "name": plan.name,
        "guests": plan.guests,
        "processes": {guest: guests.running(plan, guest) for guest in GUESTS},
        "agent": bool(guests.with_arguments(agent_arguments(plan))),
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
def taken_down(plan: LabPlan, always: bool = True) -> Iterator[None]:
    """Take the lab down after the body, or only if the body raises.

    Ctrl-C, SIGTERM and a lost terminal end the body; a second one doesn't stop the taking down.
    """

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, interrupt) for number in INTERRUPTIONS}
    finished = False
    try:
        yield
        finished = True
    finally:
        if always or not finished:
            for number in INTERRUPTIONS:
                signal.signal(number, signal.SIG_IGN)
            down(plan)
        for number, handler in previous.items():
            signal.signal(number, handler)
