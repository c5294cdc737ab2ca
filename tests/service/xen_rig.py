"""Both engines of a libxl-live pair with workers of their own and a stand-in for libxl; the link is a queue."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from coloebpf.control import PairState
from coloebpf.errors import DeviceError
from coloebpf.model import State
from coloebpf.service.config import Address, LibxlLiveConfig
from coloebpf.service.engine import Committed, EngineEvent, Ready, Replacing, Suspended
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.xen_domains import Domains
from coloebpf.service.engines.xen_primary import XenPrimary
from coloebpf.service.engines.xen_secondary import XenSecondary
from coloebpf.xen.watcher import Watcher
from tests.service.fake_xen import FakeXen
from tests.service.qemu_rig import INDEX, TAPS, FakeVifs

SOON_S = 60.0  # seconds that anything may take on a busy machine
HOUR_S = 3600.0  # between two looks that nothing has asked for: no test lasts so long
VIFS = [("tapA",), ("tapB",)]
assert VIFS == TAPS


MAC = "02:c0:10:00:00:01"


def guest(name: str = "web", bridge: str = "tapA-x") -> dict[str, Any]:
    """A libxl_domain_config that is fit, as libxl writes it."""
    return {
        "c_info": {"type": "hvm", "name": name, "uuid": "11111111-2222-3333-4444-555555555555", "domid": 1},
        "b_info": {"type.hvm": {"xen_platform_pci": "False"}},
        "nics": [
            {"devid": 0, "mac": MAC, "model": "e1000", "nictype": "vif_ioemu", "ifname": "own0",
             "script": "/etc/xen/scripts/vif-coloebpf", "bridge": bridge}
        ],
    }  # fmt: skip


class FakePorts:
    """What the ports were told; `broken`: sch_plug is not there."""

    def __init__(self, note: Callable[[str], object]) -> None:
        self._note, self.broken = note, False

    def hold(self, vif: str) -> None:
        self._do("hold", vif)

    def release(self, vif: str) -> None:
        self._do("release", vif)

    def _do(self, what: str, vif: str) -> None:
        with contextlib.suppress(RuntimeError):
            asyncio.get_running_loop()
            raise AssertionError("pyroute2 can't work in a thread with a running loop")
        if self.broken:
            raise DeviceError(f"{vif} can't keep frames")
        self._note(f"{what} {vif}")


class Rig:
    """`steps`: words, events of both engines and what the ports were told, in order."""

    def __init__(
        self,
        work_dir: Path,
        port: int,
        step_timeout_s: int = 60,
        precopy: Path | None = None,
        encryption: Mapping[str, Encryption] = MappingProxyType({}),
    ) -> None:
        self._encryption = encryption
        self.dirs = {host: work_dir / host for host in "ab"}
        self.xen = {host: FakeXen(path / "xen") for host, path in self.dirs.items()}
        self.configs = {
            host: LibxlLiveConfig(
                domain="web", listen=Address("127.0.0.1", port), copy_timeout_s=60, step_timeout_s=step_timeout_s,
                run_dir=path / "run", precopy=precopy,
            )
            for host, path in self.dirs.items()
        }  # fmt: skip
        self.watchers = {host: Watcher(path / "xenstored", net_s=HOUR_S) for host, path in self.dirs.items()}
        self.state = State.SYNCING  # of the primary's pair
        self.vifs = FakeVifs()
        self.vifs.word = PairState(State.SYNCING, 0)
        self.steps: list[str] = []
        self.events: list[tuple[str, EngineEvent]] = []
        self.on_step: Callable[[str], None] = lambda step: None
        self.lost: set[str] = set()  # words of which the next one is
        self.ports = FakePorts(self._note)
        self.domid = self.xen["a"].create(guest(), "0")
        self.primary = self.make_primary()
        self.secondary = self.make_secondary()

    def _domains(self, host: str) -> Domains:
        argv = (sys.executable, "-m", "tests.service.fake_xen", str(self.xen[host].home))
        return Domains("web", self.configs[host], VIFS, self.watchers[host], argv, self._encryption.get(host))

    def make_primary(self) -> XenPrimary:
        return XenPrimary(
            self._domains("a"), lambda event: self._hear("a", event), self._to("b"), lambda: self.state,
            lambda: INDEX["tapA"], [MAC], INDEX.__getitem__,
        )  # fmt: skip

    def make_secondary(self) -> XenSecondary:
        return XenSecondary(
            [0], self._domains("b"), self.vifs, self.ports, lambda event: self._hear("b", event), self._to("a"),
            lambda: self.vifs.word, INDEX.__getitem__,
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
        assert not self.workers("ab"), "a worker is left"

    # ---- acting ----------------------------------------------------------------------------------------------------

    async def checkpoint(self) -> None:
        """Until the SVM runs."""
        seen = len(self.steps)
        await self.primary.request_checkpoint()
        await self.until(lambda: "a Committed" in self.steps[seen:], "a commit")
        await self.until(lambda: self.secondary.svm is not None and not self.svm()["paused"], "the SVM to run")

    def remember(self, memory: str) -> None:
        """What the PVM has in its memory from here on."""
        self.xen["a"].write(self.domid, memory=memory)

    def tell(self, host: str, what: str) -> Callable[[], None]:
        """hold.ORDER or fail.ORDER; returns what takes it back."""
        (self.xen[host].home / what).touch()
        return lambda: (self.xen[host].home / what).unlink(missing_ok=True)

    async def until(self, there: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(SOON_S):
                while not there():
                    await asyncio.sleep(0.01)
        except TimeoutError:
            raise AssertionError(f"waited in vain for {what}; {self.steps}") from None

    # ---- looking ---------------------------------------------------------------------------------------------------

    def pvm(self) -> dict[str, Any]:
        return self.xen["a"].read(self.domid)

    def svm(self) -> dict[str, Any]:
        assert self.secondary.svm is not None
        return self.xen["b"].read(self.secondary.svm.domid)

    def names(self, host: str = "b") -> list[str]:
        return sorted(domain.name for domain in self.xen[host].domains())

    def orders(self, host: str) -> list[str]:
        return (self.xen[host].home / "log").read_text().splitlines()

    def workers(self, hosts: str, log: str = "") -> list[int]:
        """Processes; `log`: of those only the one that complains there."""
        found = []
        for pid in (int(path.name) for path in Path("/proc").glob("[0-9]*")):
            try:
                line = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                says = os.readlink(f"/proc/{pid}/fd/2")
            except OSError:
                continue
            ours = any(str(self.xen[host].home).encode() in line for host in hosts)
            if ours and says.endswith(f"/{log}.log" if log else ".log"):
                found.append(pid)
        return found

    def kill(self, host: str, log: str) -> None:
        """A worker, as the kernel would."""
        [pid] = self.workers(host, log)
        os.kill(pid, signal.SIGKILL)

    def _note(self, step: str) -> None:
        self.steps.append(step)
        self.on_step(step)

    def _hear(self, host: str, event: EngineEvent) -> None:
        self.events.append((host, event))
        self._note(f"{host} {type(event).__name__}")
        if host == "b" and event == Replacing() and self.vifs.word.state is not State.UNPROTECTED:
            self.vifs.clear()
        if host == "a" and event == Suspended():
            self.state = State.CHECKPOINTING
        if host == "a" and event == Committed():
            self.state = State.LOCKSTEP
            self.vifs.word = PairState(State.LOCKSTEP, self.vifs.word.epoch)

    def _to(self, host: str) -> Callable[[str, int, str], object]:
        def tell(word: str, number: int, detail: str) -> None:
            if word in self.lost:
                self.lost.discard(word)
                return
            self._note(word)
            engine = self.primary if host == "a" else self.secondary
            asyncio.get_running_loop().call_soon(engine.heard, word, number, detail)

        return tell
