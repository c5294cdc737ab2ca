"""The processes of a lab: replica guests and whatever else runs in its namespaces."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from coloebpf.errors import LabError
from coloebpf.lab.plan import GUESTS, NODES, LabPlan
from coloebpf.lab.topology import NETNS_DIR
from coloebpf.netns import inside

SETTLE = 0.3  # seconds in which a command that can't work (bad option, port taken) has given up
TERM_GRACE = 1.0  # seconds between SIGTERM and SIGKILL
END_ROUNDS = 5  # until no process starts another
PROC = Path("/proc")


def start(plan: LabPlan) -> None:
    """Run the plan's command once in each guest, in a directory of its own; fails if either gives up at once."""
    running = {guest: _spawn(plan, guest) for guest in GUESTS}
    deadline = time.monotonic() + SETTLE
    while time.monotonic() < deadline:
        for guest, process in running.items():
            if process.poll():
                raise LabError(
                    f"{plan.command[0]} in {guest} ended with code {process.returncode}: {_last_words(plan, guest)}"
                )
        time.sleep(0.02)


def home(plan: LabPlan, guest: str) -> Path:
    """The guest's working directory, with its output in stdout.log and stderr.log."""
    return plan.run_dir / guest


def _spawn(plan: LabPlan, guest: str) -> subprocess.Popen[bytes]:
    directory = home(plan, guest)
    directory.mkdir(exist_ok=True)
    # A child is born into its parent thread's network namespace. Mounts stay: /tmp and /sys/fs/bpf are as everywhere.
    with (
        inside(plan.namespace(guest)),
        open(directory / "stdout.log", "wb") as out,
        open(directory / "stderr.log", "wb") as err,
    ):
        try:
            return subprocess.Popen(
                plan.command,
                cwd=directory,
                env={**os.environ, "HOME": str(directory), "TMPDIR": str(directory)},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        except OSError as error:
            raise LabError(f"can't run {plan.command[0]} in {guest}: {error.strerror}") from error


def _last_words(plan: LabPlan, guest: str) -> str:
    for log in ("stderr.log", "stdout.log"):
        lines = (home(plan, guest) / log).read_text(errors="replace").strip().splitlines()
        if lines:
            return lines[-1]
    return "it said nothing"


def running(plan: LabPlan, node: str, proc: Path = PROC, netns_dir: Path = NETNS_DIR) -> list[int]:
    """The processes whose network namespace is the node's."""
    try:
        wanted = os.stat(netns_dir / plan.namespace(node))
    except FileNotFoundError:
        return []
    found = []
    for entry in proc.iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and os.path.samestat(os.stat(entry / "ns/net"), wanted):
                found.append(int(entry.name))
    return found


def command_name(pid: int, proc: Path = PROC) -> str:
    """The process's name as the kernel has it; "" if it is gone."""
    try:
        return (proc / str(pid) / "comm").read_text().rstrip("\n")
    except OSError:
        return ""


def with_arguments(tail: list[str], proc: Path = PROC) -> list[int]:
    """The processes whose command line ends in `tail`: how the lab finds its own helpers without a pid file."""
    found = []
    for entry in proc.iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and (entry / "cmdline").read_text().split("\0")[:-1][-len(tail) :] == tail:
                found.append(int(entry.name))
    return found


def end_all(plan: LabPlan) -> int:
    """End every process in the lab's namespaces but this one and those that started it; returns how many there were.

    A service that is about to end may start another virtual machine: so until there is none.
    """
    spared, count = set(_ancestry()), 0
    for _ in range(END_ROUNDS):
        ended = end(pid for node in NODES for pid in running(plan, node) if pid not in spared)
        count += ended
        if not ended:
            break
    return count


def end(pids: Iterable[int]) -> int:
    """Ask processes to end, and kill those that don't."""
    waiting = {pid: _start_time(pid) for pid in pids}
    count = len(waiting)
    for signum, grace in ((signal.SIGTERM, TERM_GRACE), (signal.SIGKILL, TERM_GRACE)):
        for pid in waiting:
            with suppress(ProcessLookupError):
                os.kill(pid, signum)
        deadline = time.monotonic() + grace
        while waiting and time.monotonic() < deadline:
            waiting = {pid: born for pid, born in waiting.items() if born and _start_time(pid) == born}
            time.sleep(0.01)
    return count


def _start_time(pid: int, proc: Path = PROC) -> str | None:
    """When the process started, in the kernel's clock; None if it is gone or a zombie. A pid may be used again."""
    try:
        fields = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _ancestry() -> Iterable[int]:
    pid = os.getpid()
    while pid > 1:
        yield pid
        fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        pid = int(fields[1])
