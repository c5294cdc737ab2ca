"""Both engines of a pair whose guest xl copies (libxl-colo, libxl-remus), with real relays, and stand-ins for xl and libxl."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coloebpf.model import State
from coloebpf.service.config import Address
from coloebpf.service.disks import ColoDisk
from coloebpf.service.engine import Committed, EngineEvent, Overwriting, Ready, Suspended
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.xen_stream import Stream
from coloebpf.service.engines.xl_primary import XlPrimary
from coloebpf.service.engines.xl_secondary import XlSecondary
from coloebpf.xen.watcher import Watcher
from tests.service.fake_xen import FakeXen
from tests.service.xen_rig import HOUR_S, MAC, SOON_S, FakePorts, guest


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Rig:
    """`steps`: words, events of both engines and what the ports were told, in order. Host a is the primary."""

    def __init__(
        self,
        work_dir: Path,
        colo: bool = True,
        state: State = State.SYNCING,
        encryption: Mapping[str, Encryption | None] = MappingProxyType({}),
        disks: Mapping[str, ColoDisk] = MappingProxyType({}),
    ) -> None:
        self.xen = {host: FakeXen(work_dir / host / "xen") for host in "ab"}
        self.streams = {
            host: self._stream(work_dir / host, colo, encryption.get(host), disks.get(host)) for host in "ab"
        }
        self.watchers = {host: Watcher(work_dir / host / "xenstored", net_s=HOUR_S) for host in "ab"}
        self.state = {"a": state, "b": state}
        self.steps: list[str] = []
        self.events: list[tuple[str, EngineEvent]] = []
        self.on_step: Callable[[str], None] = lambda step: None
        self.deaf: set[str] = set()  # hosts that hear nothing
        self.lacks = dict.fromkeys("ab", "")
        config = guest() | ({"disks": [{"readwrite": 1} | disks["a"].in_libxl()]} if disks else {})
        self.domid = self.xen["a"].create(config, "0", paused=bool(disks))
        self.primary = self.make_primary()
        self.secondary = self.make_secondary()

    def _stream(self, home: Path, colo: bool, encryption: Encryption | None, disk: ColoDisk | None) -> Stream:
        words = f"exec {sys.executable} -m tests.service.fake_xl {home}/xen"
        for name, first in (("xl", ""), ("store", "xenstore-write ")):
            (home / name).write_text(f'#!/bin/sh\n{words} {first}"$@"\n')
            (home / name).chmod(0o755)
        return Stream(
            "web", colo, "web", Address("127.0.0.1", _free_port()), Address("127.0.0.1", _free_port()) if colo else None,
            100, 60, 30, home / "run", encryption, str(home / "xl"), str(home / "store"),
            (sys.executable, "-m", "tests.service.fake_xen", f"{home}/xen"), disk, home,
        )  # fmt: skip

    def make_primary(self) -> XlPrimary:
        return XlPrimary(
            self.streams["a"], self.watchers["a"], ["tapA-x"], [MAC], lambda event: self._hear("a", event),
            self._to("b"), lambda: self.state["a"], lambda: self.lacks["a"],
        )  # fmt: skip

    def make_secondary(self) -> XlSecondary:
        ports = FakePorts(self._note)
        return XlSecondary(
            self.streams["b"], self.watchers["b"], ["tapA"], ports, lambda event: self._hear("b", event), self._to("a"),
            lambda: self.state["b"], lambda: self.lacks["b"],
        )  # fmt: skip

    async def up(self) -> None:
        await self.secondary.start()
        await self.primary.start()
        await self.until(lambda: ("a", Ready()) in self.events, "Ready")

    async def down(self) -> None:
        for host in "ab":
            for path in self.xen[host].home.glob("hold.*"):
                path.unlink()
        await self.primary.stop()
        await self.secondary.stop()
        self.kill("ab", "")

    # ---- acting ----------------------------------------------------------------------------------------------------

    async def checkpoint(self, memory: str = "") -> None:
        """Until the SVM has that in its memory, and both guests run."""
        if memory:
            self.xen["a"].write(self.domid, memory=memory)
        seen = len(self.steps)
        await self.primary.request_checkpoint()
        await self.until(lambda: "a Committed" in self.steps[seen:], "a commit")
        await self.until(lambda: self.runs("a") and self.runs("b"), "both to run")

    def remember(self, memory: str) -> None:
        self.xen["a"].write(self.domid, memory=memory)

    def set_state(self, state: State) -> None:
        """Of the pair on both hosts."""
        self.state = {"a": state, "b": state}

    def kill(self, hosts: str, what: str) -> None:
        """Processes, by a word of their command lines."""
        for pid in self.processes(hosts, what):
            with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
                os.kill(pid, signal.SIGKILL)

    async def until(self, there: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(SOON_S):
                while not there():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            logs = [path.read_text(errors="replace") for s in self.streams.values() for path in s.home.glob("*.log")]
            raise AssertionError(f"waited in vain for {what}; {self.steps}; {logs}") from None

    # ---- looking ---------------------------------------------------------------------------------------------------

    def named(self, host: str, name: str) -> dict[str, Any] | None:
        found = [domain.domid for domain in self.xen[host].domains() if domain.name == name]
        return self.xen[host].read(found[0]) if found else None

    def runs(self, host: str) -> bool:
        whole = self.named(host, "web" if host == "a" else "web--incoming")
        return whole is not None and not whole["suspended"] and not whole["paused"]

    def processes(self, hosts: str, what: str = "") -> list[int]:
        """Of xl and relays of these hosts."""
        found = []
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").replace("\0", " ")
            except OSError:
                continue
            ours = any(f"{self.xen[host].home.parent}/" in line for host in hosts)
            if ours and what in line and ("fake_xl" in line or "xen.relay" in line):
                found.append(pid)
        return found

    def _note(self, step: str) -> None:
        self.steps.append(step)
        self.on_step(step)

    def _hear(self, host: str, event: EngineEvent) -> None:
        self.events.append((host, event))
        self._note(f"{host} {type(event).__name__}")
        if host == "a" and isinstance(event, Overwriting | Suspended):
            self.state["a"] = State.CHECKPOINTING
        if host == "a" and event == Committed():
            self.set_state(State.LOCKSTEP)

    def _to(self, host: str) -> Callable[[str, int, str], object]:
        def tell(word: str, number: int, detail: str) -> None:
            if host in self.deaf:
                return
            self._note(word)
            engine = self.primary if host == "a" else self.secondary
            asyncio.get_running_loop().call_soon(engine.heard, word, number, detail)

        return tell
