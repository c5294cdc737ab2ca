"""Two QEMUs whose disk is replicated as libxl has it done: its -drive lines (libxl_dm.c), its commands (libxl_colo_qdisk.c)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.config import Address, LibxlDisk
from coloebpf.service.disks import ColoDisk
from coloebpf.service.engines.xl_disk import Monitor, PrimaryDisk, SecondaryDisk

KIB = 1 << 10
SIZE = 8 << 20
START_S = 60.0
DOMID = 5
BLOCK = 64 * KIB  # what is written and read at once
OLD, PVM, SVM = 0x11, 0x22, 0x33  # bytes: of the image at the start, of either guest


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Qemu:
    """One that runs no guest; `block` of it is the guest's disk."""

    def __init__(self, home: Path, block: str, drives: list[str]) -> None:
        self.home, self.block = home, block
        path = home / f"qmp-libxenstat-{DOMID}"
        words = [word for drive in drives for word in ("-drive", drive)]
        self.process = subprocess.Popen(
            ["qemu-system-x86_64", "-M", "pc", "-m", "16", "-S", "-display", "none", "-nodefaults", "-accel", "tcg",
             "-qmp", f"unix:{path},server=on,wait=off", *words]
        )  # fmt: skip
        self.path = path

    async def up(self) -> None:
        async with asyncio.timeout(START_S):
            while not self.path.exists():
                assert self.process.poll() is None
                await asyncio.sleep(0.02)

    async def do(self, command: str, **arguments: object) -> Any:
        async with Monitor(DOMID, self.home) as monitor:
            return await monitor.do(command, **arguments)

    async def human(self, line: str) -> str:
        return str(await self.do("human-monitor-command", command_line=line))

    async def write(self, block: int, byte: int) -> None:
        """As the guest would, with a flush behind it."""
        for line in (f"write -P {byte} {block * BLOCK} {BLOCK}", "flush"):
            await self.human(f'qemu-io {self.block} "{line}"')

    def end(self) -> None:
        """It is killed."""
        self.process.kill()
        self.process.wait()


class Replication:
    """A primary and a secondary, whose images are alike."""

    def __init__(self, work_dir: Path) -> None:
        at = Address("127.0.0.1", _free_port())
        other = Address("127.0.0.1", 1)
        homes = {host: work_dir / host for host in "ab"}
        for home in homes.values():
            home.mkdir()
            (home / "web.img").write_bytes(bytes([OLD]) * SIZE)
        overlays = work_dir / "o"
        a = LibxlDisk(image=homes["a"] / "web.img", directory=overlays, listen=other, peer_listen=at)
        b = LibxlDisk(image=homes["b"] / "web.img", directory=overlays / "b", listen=at, peer_listen=other)
        self.at = at
        self.primary = PrimaryDisk(ColoDisk("web", a), homes["a"])
        self.secondary = SecondaryDisk(ColoDisk("web", b), homes["b"])
        self.secondary.disk.prepare()
        export = a.export
        common = "media=disk,cache=writeback"
        self.a = Qemu(
            homes["a"], export,
            [f"if=ide,index=0,{common},driver=quorum,id={export},children.0.file.filename={a.image},"
             "children.0.driver=raw,read-pattern=fifo,vote-threshold=1"],
        )  # fmt: skip
        disk = self.secondary.disk
        self.b = Qemu(
            homes["b"], "top-colo",
            [f"if=none,driver=raw,file={b.image},id={export}",
             f"if=ide,index=0,id=top-colo,{common},driver=replication,mode=secondary,top-id=top-colo,"
             f"file.driver=qcow2,file.file.filename={disk.active},"
             f"file.backing.driver=qcow2,file.backing.file.filename={disk.hidden},file.backing.backing={export}"],
        )  # fmt: skip
        self.export = export

    async def start(self) -> None:
        """As at the first checkpoint."""
        await self.a.up()
        await self.b.up()
        at = {"type": "inet", "data": {"host": self.at.host, "port": str(self.at.port)}}
        await self.b.do("nbd-server-start", addr=at)
        await self.b.do("nbd-server-add", device=self.export, writable=True)
        await self.b.do("xen-set-replication", enable=True, primary=False)
        await self.attach()
        await self.a.do("xen-set-replication", enable=True, primary=True)

    async def attach(self) -> str:
        """The primary's way to the secondary; what QEMU says."""
        said = await self.a.human(
            f"drive_add -n buddy driver=replication,mode=primary,file.driver=nbd,file.host={self.at.host},"
            f"file.port={self.at.port},file.export={self.export},node-name=colo_node768"
        )
        await self.a.do("x-blockdev-change", parent=self.export, node="colo_node768")
        return said

    async def checkpoint(self) -> None:
        for qemu in (self.a, self.b):
            await qemu.do("xen-colo-do-checkpoint")

    async def detach(self) -> None:
        """As at the end of a protection, on the primary."""
        await self.a.do("xen-set-replication", enable=False, primary=True)
        await self.a.do("x-blockdev-change", parent=self.export, child="children.1")

    async def libxl_takes_over(self) -> None:
        """As libxl does it, which looks at no error."""
        for command, arguments in (
            ("xen-set-replication", {"enable": False, "primary": False}),
            ("nbd-server-stop", {}),
        ):
            with contextlib.suppress(EngineError):
                await self.b.do(command, **arguments)

    async def quit(self, qemu: Qemu) -> None:
        """In order: all is written."""
        with contextlib.suppress(Exception):
            await qemu.do("quit")
        await asyncio.to_thread(qemu.process.wait, START_S)

    def end(self) -> None:
        for qemu in (self.a, self.b):
            qemu.end()

    def image(self, host: str, block: int) -> int:
        """The byte of that block in a host's image file."""
        side = self.primary if host == "a" else self.secondary
        with side.disk.image.open("rb") as file:
            file.seek(block * BLOCK)
            return file.read(1)[0]
