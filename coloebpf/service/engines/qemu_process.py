"""Processes of QEMU's that an engine starts: they outlive the service, and the next one finds them by their records."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.engines.qmp import Qmp

START_S = 10.0  # to open its socket; some 0.1 s when the machine is not busy
LOOK_S = 0.01
END_S = 5.0  # for a killed process to be gone
# What it becomes has a record by then: a service that is killed before leaves nothing that the next one does not find.
ONCE_RECORDED = ("/bin/sh", "-c", 'read -r go && exec "$@" </dev/null', "sh")


@dataclass(eq=False)
class Process:
    """One of them. `child`: to be reaped, if this very service has started it."""

    name: str
    pid: int
    qmp: Qmp
    child: subprocess.Popen[bytes] | None = None

    @property
    def slot(self) -> int:
        """Of a virtual machine."""
        return int(self.name)

    @property
    def ended(self) -> bool:
        return not _since(self.pid) if self.child is None else self.child.poll() is not None


class Processes:
    """Those of a directory, which has a socket, a log and a record of each.

    `on_event` and `on_gone` are told of those that were started or adopted here, until end().
    """

    def __init__(self, home: Path, title: str) -> None:
        self.home, self.title = home, title
        self.on_event: Callable[[Process, str, Mapping[str, Any]], None] = lambda process, name, data: None
        self.on_gone: Callable[[Process], None] = lambda process: None
        self._ended: set[Process] = set()

    def socket(self, name: str) -> Path:
        """Of QMP."""
        return self.home / f"{name}.qmp"

    async def start(self, name: str, argv: Sequence[str]) -> Process:
        """Raises EngineError if it does not open its socket, with what it has said."""
        self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket(name).unlink(missing_ok=True)
        spawning = asyncio.get_running_loop().create_task(asyncio.to_thread(self._spawn, name, argv))
        try:
            child = await asyncio.shield(spawning)
        except asyncio.CancelledError:
            child = await spawning  # its thread goes on all the same
            await self.end(self._process(name, child.pid, child))
            raise
        process = self._process(name, child.pid, child)
        try:
            async with asyncio.timeout(START_S):
                while not await self._answers(process):
                    if process.ended:
                        said = self._log(name).read_text(errors="replace").strip()[-300:] or "it said nothing"
                        raise EngineError(f"{argv[0]} of {self.title} ended at its start: {said}")
                    await asyncio.sleep(LOOK_S)
        except TimeoutError as e:
            await self.end(process)
            raise EngineError(f"{argv[0]} of {self.title} has not opened its QMP in {START_S:g} s") from e
        except BaseException:  # also if nobody waits for it any more: a service that ends may be the last one
            await self.end(process)
            raise
        return process

    async def _answers(self, process: Process) -> bool:
        """Its socket is there a moment before it listens."""
        if not self.socket(process.name).exists():
            return False
        try:
            await process.qmp.connect(self.socket(process.name))
        except EngineError:
            return False
        return True

    async def adopt(self, name: str) -> Process | None:
        """What an earlier service has left, if it answers; else it is ended."""
        try:
            record = json.loads(self._record(name).read_text())
            pid, since = int(record["pid"]), int(record["since"])
        except (OSError, ValueError, KeyError):
            return None
        if _since(pid) != since:
            return None
        process = self._process(name, pid)
        try:
            await process.qmp.connect(self.socket(name))
        except EngineError:
            await self.end(process)
            return None
        return process

    async def end(self, process: Process) -> None:
        """Kills it, and returns when what it has used is free. What it says from here on is not told."""
        self._ended.add(process)
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        await process.qmp.close()
        end = time.monotonic() + END_S
        while not process.ended and time.monotonic() < end:
            await asyncio.sleep(LOOK_S)
        self._record(process.name).unlink(missing_ok=True)
        self._ended.discard(process)

    def _spawn(self, name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        with self._log(name).open("wb") as log:
            child = subprocess.Popen(
                (*ONCE_RECORDED, *argv),
                stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True, cwd=self.home,
            )  # fmt: skip
        self._record(name).write_text(json.dumps({"pid": child.pid, "since": _since(child.pid)}))
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError), child.stdin as go:
            go.write(b"\n")
        return child

    def _process(self, name: str, pid: int, child: subprocess.Popen[bytes] | None = None) -> Process:
        def event(what: str, data: Mapping[str, Any]) -> None:
            if process not in self._ended:
                self.on_event(process, what, data)

        def gone() -> None:
            if process not in self._ended:
                self.on_gone(process)

        process = Process(name, pid, Qmp(f"process {name} of {self.title}", event, gone), child)
        return process

    def _record(self, name: str) -> Path:
        return self.home / f"{name}.json"

    def _log(self, name: str) -> Path:
        return self.home / f"{name}.log"


def _since(pid: int) -> int:
    """When a process was started, in ticks since boot: no other with its number has the same. 0: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state == "Z" else int(rest[18])
