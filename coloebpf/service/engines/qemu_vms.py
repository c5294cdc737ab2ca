"""The QEMUs that an engine starts on its host: two places that they take in turn, each with taps of its own.

They outlive the service: a record beside each one's QMP socket says which process it is.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.config import PairConfig, QemuConfig
from coloebpf.service.engines.qmp import Qmp

SLOTS = (0, 1)
START_S = 10.0  # for a QEMU to open its socket; some 0.1 s when the machine is not busy
LOOK_S = 0.01
END_S = 5.0  # for a killed process to be gone

OnEvent = Callable[["Vm", str, Mapping[str, Any]], None]


@dataclass(eq=False)
class Vm:
    """A QEMU in a slot."""

    slot: int
    pid: int
    qmp: Qmp = field(init=False)
    child: subprocess.Popen[bytes] | None = None  # to be reaped, if this very service has started it


class Vms:
    """A pair's. `on_event` and `on_gone` are told of those that were started or adopted here, until end()."""

    def __init__(self, name: str, config: QemuConfig, taps: Sequence[tuple[str, ...]]) -> None:
        self.name, self.config = name, config
        self.on_event: OnEvent = lambda vm, name, data: None
        self.on_gone: Callable[[Vm], None] = lambda vm: None
        self._taps = taps
        self._dir = config.run_dir / name
        self._ended: set[Vm] = set()

    @classmethod
    def of(cls, pair: PairConfig, config: QemuConfig) -> Vms:
        """As the pair's configuration says."""
        taps = [tuple((nic.vif, nic.standby_vif)[slot] for nic in pair.nics) for slot in SLOTS]
        return cls(pair.name, config, taps)

    def taps(self, slot: int) -> tuple[str, ...]:
        """Names of the slot's devices, in the order of the pair's NICs."""
        return self._taps[slot]

    def socket(self, slot: int) -> Path:
        """Of QMP."""
        return self._dir / f"{slot}.qmp"

    async def start(self, slot: int) -> Vm:
        """A fresh QEMU that waits for a migration. Raises EngineError."""
        self._dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.socket(slot).unlink(missing_ok=True)
        child = await asyncio.to_thread(self._spawn, slot)
        self._record(slot).write_text(json.dumps({"pid": child.pid, "since": _since(child.pid)}))
        vm = Vm(slot, child.pid, child=child)
        try:
            async with asyncio.timeout(START_S):
                while not self.socket(slot).exists():
                    if child.poll() is not None:
                        raise EngineError(f"a QEMU of {self.name} ended at its start: {self._said(slot)}")
                    await asyncio.sleep(LOOK_S)
                await self._connect(vm)
        except TimeoutError as e:
            await self.end(vm)
            raise EngineError(f"a QEMU of {self.name} has not opened {self.socket(slot)} in {START_S:g} s") from e
        except EngineError:
            await self.end(vm)
            raise
        return vm

    async def adopt(self, slot: int) -> Vm | None:
        """The QEMU that an earlier service has left in the slot, if it answers; else it is ended."""
        try:
            record = json.loads(self._record(slot).read_text())
            pid, since = int(record["pid"]), int(record["since"])
        except (OSError, ValueError, KeyError):
            return None
        if _since(pid) != since:
            return None
        vm = Vm(slot, pid)
        try:
            await self._connect(vm)
        except EngineError:
            await self.end(vm)
            return None
        return vm

    async def end(self, vm: Vm) -> None:
        """Kills it, and returns when its taps are free. What it says from here on is not told."""
        self._ended.add(vm)
        with contextlib.suppress(ProcessLookupError):
            os.kill(vm.pid, signal.SIGKILL)
        await vm.qmp.close()
        end = time.monotonic() + END_S
        while (vm.child.poll() is None if vm.child else _since(vm.pid)) and time.monotonic() < end:
            await asyncio.sleep(LOOK_S)
        self._record(vm.slot).unlink(missing_ok=True)
        self._ended.discard(vm)

    def guest(self) -> int | None:
        """The slot of a QEMU that has become the guest by a failover."""
        try:
            return int((self._dir / "guest").read_text())
        except (OSError, ValueError):
            return None

    def note_guest(self, slot: int | None) -> None:
        """For the next service, whatever this host's role will be."""
        if slot is None:
            (self._dir / "guest").unlink(missing_ok=True)
        else:
            (self._dir / "guest").write_text(str(slot))

    def _spawn(self, slot: int) -> subprocess.Popen[bytes]:
        known = {"{qmp}": str(self.socket(slot)), "{name}": self.name}
        known |= {f"{{tap{i}}}": tap for i, tap in enumerate(self._taps[slot])}
        argv = [*self.config.command, "-S", "-incoming", "defer"]
        for hole, value in known.items():
            argv = [word.replace(hole, value) for word in argv]
        with self._log(slot).open("wb") as log:
            try:
                return subprocess.Popen(
                    argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self._dir
                )
            except OSError as e:
                raise EngineError(f"{argv[0]} can't be run: {e.strerror}") from e

    async def _connect(self, vm: Vm) -> None:
        def event(name: str, data: Mapping[str, Any]) -> None:
            if vm not in self._ended:
                self.on_event(vm, name, data)

        def gone() -> None:
            if vm not in self._ended:
                self.on_gone(vm)

        vm.qmp = Qmp(f"the QEMU of {self.name} in slot {vm.slot}", event, gone)
        await vm.qmp.connect(self.socket(vm.slot))

    def _record(self, slot: int) -> Path:
        return self._dir / f"{slot}.json"

    def _log(self, slot: int) -> Path:
        return self._dir / f"{slot}.log"

    def _said(self, slot: int) -> str:
        return self._log(slot).read_text(errors="replace").strip()[-300:] or "it said nothing"


def _since(pid: int) -> int:
    """When a process was started, in ticks since boot: no other with its number has the same. 0: there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    state, *rest = stat.rpartition(")")[2].split()
    return 0 if state == "Z" else int(rest[18])
