"""A guest's disks on the secondary: what the PVM has written, layer on layer, a new one from each checkpoint on.

qemu-storage-daemon takes the PVM's writes by NBD into the top layer. At a checkpoint, while the PVM stands still, the
top is closed and another begins above it: the closed one is the disk as the checkpoint's memory expects it, and the SVM
runs on a throw-away layer of its own above that. What the PVM writes later is in a layer that this SVM never sees.

Closed layers are merged into the lowest one later. Whoever reads through a closed layer does not see that: what is
written below is what the layer has. So the daemon's own locks on the files are off.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.config import QemuConfig
from coloebpf.service.engines.qemu_process import Process, Processes
from coloebpf.service.log import say

DAEMON = "qemu-storage-daemon"  # Debian's qemu-system-common
NAME = "disks"
JOB_S = 10.0  # for the making of an empty image: some ms

logger = logging.getLogger("coloebpf.qemu")


class Disk:
    """One disk's files in its directory: layer0 is the lowest, `layers` are those of the chain, the top last."""

    def __init__(self, number: int, directory: Path, size: int) -> None:
        self.number, self.directory, self.size = number, directory, size
        self.layers: list[int] = []
        self.prepared: int | None = None  # the next top
        self.settled = 0  # the SVM reads this one and what is below

    def file(self, layer: int | str) -> Path:
        return self.directory / f"layer{layer}.qcow2"

    def node(self, layer: int | str) -> str:
        return f"d{self.number}-{layer}"


class Disks:
    """Those of a pair, while this host is its secondary. `on_gone`: the daemon has died."""

    def __init__(self, name: str, config: QemuConfig) -> None:
        self._config = config
        self._processes = Processes(config.run_dir / name, name)
        self._processes.on_event = self._event
        self._processes.on_gone = self._gone
        self._daemon: Process | None = None
        self._open = False
        self._disks: list[Disk] = []
        self._jobs = itertools.count()
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._merging: asyncio.Task[None] | None = None

    @property
    def there(self) -> bool:
        """They take the PVM's writes."""
        return self._daemon is not None and self._open

    async def begin(self, sizes: Sequence[int]) -> None:
        """Empty copies of disks of `sizes` bytes, open for the PVM's writes. Raises EngineError."""
        await self.end()
        self._notes.unlink(missing_ok=True)  # of other copies: a service that ends before there are new ones has none
        self._disks = []
        listen = self._config.disk_listen
        if listen is None or len(sizes) != len(self._config.disks):
            raise EngineError(f"{self._processes.title} has {len(sizes)} disks, [pair.qemu] of this host others")
        where = f"addr.type=inet,addr.host={listen.host},addr.port={listen.port}"
        monitor = f"socket,path={self._processes.socket(NAME)},server=on,wait=off,id=qmp"
        argv = [DAEMON, "--chardev", monitor, "--monitor", "chardev=qmp", "--nbd-server", where]
        self._daemon = await self._processes.start(NAME, argv)
        self._disks = [
            Disk(i, one.directory, size) for i, (one, size) in enumerate(zip(self._config.disks, sizes, strict=True))
        ]
        for disk in self._disks:
            disk.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            for old in disk.directory.glob("layer*.qcow2"):
                old.unlink()
            await self._create(disk, 0, None)
            await self._do("blockdev-add", driver="qcow2", node_name=disk.node(0), file=disk.node("0-file"))
            disk.layers = [0]
            await self._do(
                "block-export-add", type="nbd", id=disk.node("export"), node_name=disk.node(0),
                name=f"disk{disk.number}", writable=True,
            )  # fmt: skip

        self._open = True

    async def end(self) -> None:
        """No more writes are taken. The files stay: a guest may run on them."""
        self._open = False
        if self._merging is not None:
            self._merging.cancel()
            await asyncio.gather(self._merging, return_exceptions=True)
        daemon, self._daemon = self._daemon or await self._processes.adopt(NAME), None
        if daemon is not None:
            await self._processes.end(daemon)

    async def adopt(self) -> bool:
        """Goes on with what an earlier service has left. False: it is not there, or not whole."""
        daemon = await self._processes.adopt(NAME)
        if daemon is None:
            return False
        self._daemon = daemon
        try:
            noted = json.loads(self._notes.read_text())
            self._disks = []
            for i, (one, note) in enumerate(zip(self._config.disks, noted, strict=True)):
                disk = Disk(i, one.directory, note["size"])
                disk.layers, disk.prepared, disk.settled = note["layers"], note["prepared"], note["settled"]
                self._disks.append(disk)
            for job in await self._do("query-block-jobs"):
                await self._do("block-job-cancel", device=job["device"], force=True)
        except (OSError, ValueError, KeyError, EngineError):
            await self.end()
            return False
        self._open = True
        return True

    async def close(self) -> None:
        """The service ends; the daemon goes on."""
        if self._daemon is not None:
            await self._daemon.qmp.close()

    async def layer(self, slot: int) -> list[Path]:
        """Files for a standby's disks, over what will be the state of the next checkpoint. Raises EngineError."""
        files = []
        for disk in self._disks:
            top = disk.layers[-1]
            await self._create(disk, f"-svm{slot}", top)
            await self._do("blockdev-del", node_name=disk.node(f"-svm{slot}-file"))
            files.append(disk.file(f"-svm{slot}"))
            if disk.prepared is None:
                number = top + 1
                await self._create(disk, number, top)
                await self._do(
                    "blockdev-add", driver="qcow2", node_name=disk.node(number), file=disk.node(f"{number}-file"),
                    backing=None,
                )  # fmt: skip
                disk.prepared = number
        self._note()
        return files

    async def cut(self) -> None:
        """The PVM stands still: what it writes from here on is in other layers, of all disks. Raises EngineError."""
        actions = [
            {"type": "blockdev-snapshot", "data": {"node": disk.node(disk.layers[-1]), "overlay": disk.node(prepared)}}
            for disk in self._disks
            if (prepared := disk.prepared) is not None
        ]
        if len(actions) < len(self._disks):
            raise EngineError("there is no layer for what the PVM will write")
        await self._do("transaction", actions=actions)
        for disk in self._disks:
            assert disk.prepared is not None
            disk.layers.append(disk.prepared)
            disk.prepared = None
        self._note()

    def settle(self) -> None:
        """The standby that was made last is the SVM now, and the old one has ended: what is below it can be merged."""
        for disk in self._disks:
            disk.settled = disk.layers[-2]
        self._note()
        if self._merging is None or self._merging.done():
            self._merging = asyncio.get_running_loop().create_task(self._merge())

    async def hold(self) -> None:
        """A checkpoint comes: nothing is merged now. What was merged half stays where it is read from."""
        if self._merging is not None and not self._merging.done():
            self._merging.cancel()
            await asyncio.gather(self._merging, return_exceptions=True)

    async def _merge(self) -> None:
        try:
            for disk in self._disks:
                while 0 < disk.layers[1] <= disk.settled:
                    await self._merge_one(disk, disk.layers[1])
        except EngineError as e:
            say(logger, logging.WARNING, "layers of a disk stay unmerged", pair=self._processes.title, error=e)

    async def _merge_one(self, disk: Disk, closed: int) -> None:
        job = f"merge{next(self._jobs)}"
        try:
            await self._do(
                "block-commit", job_id=job, device=disk.node(disk.layers[-1]), top_node=disk.node(closed),
                base_node=disk.node(disk.layers[0]), auto_dismiss=False,
            )  # fmt: skip
            await self._job(job, timeout_s=None)
        except asyncio.CancelledError:
            with contextlib.suppress(EngineError):
                await self._do("block-job-cancel", device=job, force=True)
                await self._job(job, JOB_S)
            raise
        del disk.layers[1]
        self._note()
        await self._do("blockdev-del", node_name=disk.node(closed))
        await self._do("blockdev-del", node_name=disk.node(f"{closed}-file"))
        disk.file(closed).unlink(missing_ok=True)  # a VM that still reads it has it open

    @property
    def _notes(self) -> Path:
        return self._processes.home / "disks.layers"

    def _note(self) -> None:
        """For the next service."""
        notes = [
            {"size": disk.size, "layers": disk.layers, "prepared": disk.prepared, "settled": disk.settled}
            for disk in self._disks
        ]
        draft = self._notes.with_suffix(".new")
        draft.write_text(json.dumps(notes))
        draft.replace(self._notes)

    async def _create(self, disk: Disk, layer: int | str, over: int | None) -> None:
        """An empty layer; its file's node is there then, and no other."""
        path, node = disk.file(layer), disk.node(f"{layer}-file")
        path.unlink(missing_ok=True)
        await self._make({"driver": "file", "filename": str(path), "size": 0})
        await self._do("blockdev-add", driver="file", node_name=node, filename=str(path), locking="off")
        options: dict[str, object] = {"driver": "qcow2", "file": node, "size": disk.size}
        if over is not None:
            options |= {"backing-file": str(disk.file(over)), "backing-fmt": "qcow2"}
        await self._make(options)

    async def _make(self, options: Mapping[str, object]) -> None:
        job = f"make{next(self._jobs)}"
        await self._do("blockdev-create", job_id=job, options=options)
        await self._job(job, JOB_S)

    async def _job(self, job: str, timeout_s: float | None) -> None:
        """Until it has ended. Raises EngineError if it came to nothing."""
        ended = self._waiting.setdefault(job, asyncio.get_running_loop().create_future())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(ended)
        except TimeoutError as e:
            raise EngineError(f"{DAEMON}: job {job} has not ended in {timeout_s} s") from e
        finally:
            if ended.done():
                del self._waiting[job]
        [told] = [one for one in await self._do("query-jobs") if one["id"] == job]
        await self._do("job-dismiss", id=job)
        if "error" in told:
            raise EngineError(f"{DAEMON}: job {job} has failed: {told['error']}")

    async def _do(self, command: str, **arguments: object) -> Any:
        if self._daemon is None:
            raise EngineError(f"the {DAEMON} of {self._processes.title} is gone")
        return await self._daemon.qmp.do(command, **arguments)

    def _event(self, process: Process, name: str, data: Mapping[str, Any]) -> None:
        if name == "JOB_STATUS_CHANGE" and data.get("status") == "concluded":
            future = self._waiting.setdefault(str(data["id"]), asyncio.get_running_loop().create_future())
            if not future.done():
                future.set_result(None)

    def _gone(self, process: Process) -> None:
        self._daemon = None
