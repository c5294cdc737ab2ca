"""Both engines of a pair with real QEMUs under TCG, no network: a dataplane's entry each, and a link that is a queue."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from coloebpf.control import PairState
from coloebpf.lab import image
from coloebpf.model import State
from coloebpf.service.config import Address, QemuConfig, QemuDisk
from coloebpf.service.engine import Committed, EngineEvent, Ready, Replacing, Suspended
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.qemu_primary import QemuPrimary
from coloebpf.service.engines.qemu_process import Process
from coloebpf.service.engines.qemu_secondary import QemuSecondary
from coloebpf.service.engines.qemu_vms import Vms

DISK_BYTES = 64 << 20
SOON = 60.0  # seconds that anything may take on a busy machine, a boot too
TAPS = [("tapA",), ("tapB",)]  # by slot; nothing is attached to them here
INDEX = {"tapA": 11, "tapB": 12}
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc
/bin/busybox mount -t devtmpfs dev /dev
i=0
while :; do i=$((i+1)); echo "tick $i" >/dev/ttyS0; /bin/busybox sleep 0.05; done
"""
DISK_INIT = """#!/bin/busybox sh
/bin/busybox --install -s /bin
mkdir -p /dev /proc
mount -t devtmpfs dev /dev
for module in /modules/*.ko; do insmod $module; done
i=0
while :; do
    i=$((i+1))
    # What a VM that is ahead has written there would be another number.
    if [ $i -gt 20 ]; then
        is=$(dd if=/dev/vda bs=512 skip=$((i % 20)) count=1 iflag=direct 2>/dev/null | head -n 1)
        [ "$is" = "block $((i-20))" ] || echo "bad $i is $is" >/dev/ttyS0
    fi
    echo "block $i" | dd of=/dev/vda bs=512 seek=$((i % 20)) conv=sync,fsync 2>/dev/null
    echo "tick $i" >/dev/ttyS0
done
"""
DISK = (
    "-blockdev", "driver=qcow2,node-name=data,file.driver=file,file.filename={disk0}",
    "-device", "virtio-blk-pci,drive=data",
)  # fmt: skip


def make_initramfs(kernel: image.Kernel, work_dir: Path, disk: bool) -> Path:
    """Of a guest that counts on its serial port, and with a disk writes each number down and reads what it wrote."""
    init, archive = work_dir / "guest.init", work_dir / "guest.cpio"
    init.write_text(DISK_INIT if disk else INIT)
    modules = image.modules(kernel, (*image.VIRTIO, "drivers/block/virtio_blk.ko") if disk else ())
    image.pack({"init": init, "bin/busybox": image.BUSYBOX, **modules}, archive)
    return archive


def command(kernel: image.Kernel, archive: Path) -> tuple[str, ...]:
    """A guest of 128 MB."""
    return (
        "qemu-system-x86_64", "-name", "{name}", "-M", "q35", "-accel", "tcg", "-cpu", "max", "-m", "128M",
        "-nodefaults", "-no-user-config", "-display", "none", "-kernel", str(kernel.image), "-initrd", str(archive),
        "-device", "pcie-root-port,id=slot9,chassis=1", "-append", "console=ttyS0 quiet panic=-1 mitigations=off", "-serial", "file:{qmp}.serial",
        "-qmp", "unix:{qmp},server=on,wait=off",
    )  # fmt: skip


class FakeVifs:
    """What coloebpf.vifs.Vifs does, of one NIC, with the pair's entry in this process."""

    def __init__(self) -> None:
        self.word = PairState(State.UNPROTECTED, 0)
        self.vif, self.next_vif, self.next_epoch = INDEX["tapA"], 0, 0

    def offer(self, vifs: Mapping[int, int]) -> None:
        self.next_vif, self.next_epoch = vifs[0], self.word.epoch + 1

    def withdraw(self) -> None:
        if self.next_vif and self.word.epoch == self.next_epoch:
            self.word = PairState(self.word.state, self.word.epoch - 1)
        self.next_vif = 0

    def settle(self) -> None:
        if self.next_vif and self.word.epoch >= self.next_epoch:
            self.vif, self.next_vif = self.next_vif, 0

    def here(self, nic: int) -> int:
        return self.vif

    @property
    def now(self) -> int:
        """Where a client's frame would go."""
        return self.next_vif if self.next_vif and self.word.epoch >= self.next_epoch else self.vif

    def end(self) -> None:
        self.word = PairState(State.UNPROTECTED, self.word.epoch)

    def clear(self) -> None:
        self.word = PairState(self.word.state, self.word.epoch + 1)


class Rig:
    """`heard`: events of both engines with their times (s), in order. `follows`: the secondary's pair lets it switch."""

    def __init__(
        self,
        kernel: image.Kernel,
        work_dir: Path,
        port: int,
        disk: bool = False,
        encryption: Mapping[str, Encryption] = MappingProxyType({}),
    ) -> None:
        self._encryption = encryption
        archive = make_initramfs(kernel, work_dir, disk)
        self.argv = command(kernel, archive) + (DISK if disk else ())
        self.dirs = {host: work_dir / host for host in "ab"}
        self.configs = {
            host: QemuConfig(
                qmp=path / "pvm.qmp", command=self.argv, listen=Address("127.0.0.1", port), run_dir=path,
                disk_listen=Address("127.0.0.1", port + 1), disks=(QemuDisk(node="data", directory=path / "data"),) if disk else (),
            )
            for host, path in self.dirs.items()
        }  # fmt: skip
        self.state = State.SYNCING  # of the primary's pair
        self.vifs = FakeVifs()
        self.vifs.word = PairState(State.SYNCING, 0)
        self.follows = True
        self.heard: list[tuple[float, str, EngineEvent]] = []
        self.said: list[str] = []
        self.linked = True
        self.lost: set[str] = set()  # words of which the next one is
        self.on_step: Callable[[str], None] = lambda step: None  # words, and names of events
        self._pvm: subprocess.Popen[bytes] | None = None
        self.primary = self.make_primary()
        self.secondary = self.make_secondary()

    # ---- making ----------------------------------------------------------------------------------------------------

    def make_primary(self) -> QemuPrimary:
        vms = Vms("web", self.configs["a"], TAPS, self._encryption.get("a"))
        return QemuPrimary(vms, lambda event: self._hear("a", event), self._to("b"), lambda: self.state)

    def make_secondary(self) -> QemuSecondary:
        vms = Vms("web", self.configs["b"], TAPS, self._encryption.get("b"))
        return QemuSecondary(
            [0], vms, self.vifs, lambda event: self._hear("b", event), self._to("a"), lambda: self.vifs.word,
            INDEX.__getitem__,
        )  # fmt: skip

    async def up(self) -> None:
        """A booted PVM, both engines started."""
        for path in self.dirs.values():
            path.mkdir()
        qmp = self.configs["a"].qmp
        argv = [word.replace("{qmp}", str(qmp)).replace("{name}", "web") for word in self.argv]
        raw = self.dirs["a"] / "own.img"
        raw.write_bytes(b"")
        os.truncate(raw, DISK_BYTES)
        argv = [word.replace("driver=qcow2", "driver=raw").replace("{disk0}", str(raw)) for word in argv]
        self._pvm = subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)
        serial = Path(f"{qmp}.serial")
        await self.until(lambda: serial.exists() and b"tick 3" in serial.read_bytes(), "the guest to boot")
        await self.secondary.start()
        await self.primary.start()
        await self.until(lambda: ("a", Ready()) in self.events(), "Ready")

    async def down(self) -> None:
        """Nothing is left."""
        if self._pvm is not None:
            self._pvm.kill()
            self._pvm.wait()
        try:
            await self.primary.stop()
            await self.secondary.stop()
        finally:
            await self.until(self._none_left, "the QEMUs to end")

    def _none_left(self) -> bool:
        left = self.qemus("ab")
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    def exchange(self) -> None:
        """Both hosts' files have the other role now."""
        self.dirs = {"a": self.dirs["b"], "b": self.dirs["a"]}
        self.configs = {"a": self.configs["b"], "b": self.configs["a"]}
        self.state, self.vifs = State.SYNCING, FakeVifs()
        self.vifs.word = PairState(State.SYNCING, 0)
        self.primary, self.secondary = self.make_primary(), self.make_secondary()

    # ---- acting ----------------------------------------------------------------------------------------------------

    async def checkpoint(self) -> tuple[float, float]:
        """Milliseconds from the request to Committed, and from Suspended to the PVM's going on."""
        when: dict[type[EngineEvent], float] = {}
        while (
            Suspended not in when
        ):  # else one that had begun by itself has committed: a busy machine is late to hold it
            begin, seen = time.monotonic(), len(self.heard)
            await self.primary.request_checkpoint()
            await self.until(lambda: any(isinstance(e, Committed) for _, _, e in self.heard[seen:]), "a commit")  # noqa: B023
            when = {type(event): at for at, host, event in self.heard[seen:] if host == "a"}
            assert set(when) <= {Suspended, Committed}, when
        return (when[Committed] - begin) * 1e3, (self.resumed - when[Suspended]) * 1e3

    def once(self, step: str, act: Callable[[], object]) -> None:
        """At the next such step."""

        def look(name: str) -> None:
            if name == step:
                self.on_step = lambda step: None
                act()

        self.on_step = look

    async def until(self, there: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + SOON
        while not there():
            assert time.monotonic() < end, (
                f"waited in vain for {what}; {self.events()} {self.said[:6]} ... {self.said[-8:]}"
            )
            await asyncio.sleep(0.01)

    # ---- looking ---------------------------------------------------------------------------------------------------

    def events(self) -> list[tuple[str, EngineEvent]]:
        return [(host, event) for _, host, event in self.heard]

    @property
    def resumed(self) -> float:
        """When the PVM's QEMU has taken its `cont` last."""
        return self.primary.resumed_s

    @property
    def pvm_pid(self) -> int:
        assert self._pvm is not None
        return self._pvm.pid

    async def pvm_runs(self) -> None:
        """Returns when it does; on a busy machine QEMU takes its time to let it go on."""
        end, status = time.monotonic() + SOON, ""
        while status != "running":
            assert time.monotonic() < end, f"the PVM is {status}; {self.events()} {self.said[-8:]}"
            if self.primary.pvm is not None:
                status = str((await self.primary.pvm.do("query-status"))["status"])
            await asyncio.sleep(0.01)

    async def status(self, vm: Process | None) -> str:
        assert vm is not None
        return str((await vm.qmp.do("query-status"))["status"])

    def qemus(self, hosts: str = "b") -> list[int]:
        """Processes of a host that the engine has started."""
        marks = [f"{self.dirs[host]}/web".encode() for host in hosts]
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                line = path.read_bytes()
            except OSError:
                continue
            if line.startswith((b"qemu-system", b"qemu-storage")) and any(mark in line for mark in marks):
                found.append(int(path.parent.name))
        return found

    def svm_ticks(self) -> int:
        """How far the guest has counted in the SVM that runs."""
        assert self.secondary.svm is not None
        return ticks(self.dirs["b"] / f"web/{self.secondary.svm.slot}.qmp.serial")

    def pvm_ticks(self) -> int:
        """Likewise in the PVM that the rig has started."""
        return ticks(Path(f"{self.configs['a'].qmp}.serial"))

    def _hear(self, host: str, event: EngineEvent) -> None:
        self.heard.append((time.monotonic(), host, event))
        self.on_step(type(event).__name__)
        if host == "b" and event == Replacing() and self.follows:
            self.vifs.clear()
        if host == "a" and event == Suspended():
            self.state = State.CHECKPOINTING
        if host == "a" and event == Committed():
            self.state = State.LOCKSTEP
            self.vifs.word = PairState(State.LOCKSTEP, self.vifs.word.epoch)

    def _to(self, host: str) -> Callable[[str, int, str], object]:
        def tell(word: str, number: int, detail: str) -> None:
            if not self.linked:
                return
            if word in self.lost:
                self.lost.discard(word)
                return
            self.said.append(f"{host} {word} {number}")
            self.on_step(word)
            engine = self.primary if host == "a" else self.secondary
            asyncio.get_running_loop().call_soon(engine.heard, word, number, detail)

        return tell


def ticks(serial: Path) -> int:
    """How far a guest has counted; it must not have complained of its disk."""
    said = serial.read_bytes()
    assert b"bad" not in said, said
    whole = re.findall(rb"tick (\d+)\s", said)
    return int(whole[-1]) if whole else 0
