"""What engine libxl-colo does about a guest's replicated disk, on each side (docs/xen-disks.md).

libxl starts QEMU's block replication and asks it for checkpoints. What libxl leaves out is done here, through the
monitor that QEMU has for libxenstat, which libxl itself does not use.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from coloebpf.errors import DiskError, EngineError
from coloebpf.model import State
from coloebpf.service import disk_notes
from coloebpf.service.disk_notes import OPEN, Part, Verdict
from coloebpf.service.disks import ColoDisk, Usage
from coloebpf.service.engines.qmp import Qmp
from coloebpf.service.log import say
from coloebpf.units import amount
from coloebpf.xen.libxl import Domain

MONITORS = Path("/run/xen")  # libxl's XEN_RUN_DIR, as Debian builds it
LOOK_S = 0.2
COMMIT_LOOK_S = 1.0
QUIT_S = 5.0  # for a QEMU whose domain is gone already, to let go of its files
NODE = "colo_node"  # how libxl begins the name of the primary's replication node (libxl_colo_qdisk.c)
UNREAD = "-"  # for a sum: the host's compare_image is false

logger = logging.getLogger("coloebpf.xen")


class Monitor:
    """Of the QEMU of one domain; a connection for each question, for there can be only one. Raises EngineError."""

    def __init__(self, domid: int, directory: Path) -> None:
        self._path = directory / f"qmp-libxenstat-{domid}"
        self._qmp = Qmp(f"the guest's QEMU (domain {domid})", lambda name, data: None, lambda: None)

    async def __aenter__(self) -> Monitor:
        await self._qmp.connect(self._path)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._qmp.close()

    async def do(self, command: str, **arguments: object) -> Any:
        """See Qmp."""
        return await self._qmp.do(command, **arguments)


class _Side:
    """What both have. `errors`: see Usage. `progress`: how far the image is read, "" if it is not."""

    def __init__(self, disk: ColoDisk, monitors: Path = MONITORS) -> None:
        self.disk = disk
        self._monitors = monitors
        self.progress = ""
        self.errors = 0
        self.size = 0  # bytes of the image, as soon as they are known
        self._stop = False

    async def learn(self) -> None:
        """The image's size, for a service that begins beside a protection."""
        with contextlib.suppress(DiskError):  # it is said when a protection begins
            self.size = await asyncio.to_thread(self.disk.size)

    def usage(self, follows: bool, state: State) -> Usage:
        """For status and metrics. `follows`: see Usage; `state`: the pair's."""
        try:
            note, found = disk_notes.read(self.disk), disk_notes.verdict(self.disk, state.name.lower())
        except DiskError as e:
            note, found = None, Verdict(None, str(e))
        return self.disk.usage(
            size=self.size, errors=self.errors, follows=follows, good=found.good,
            uncommitted=note is not None and note.part in OPEN,
        )  # fmt: skip

    async def checksum(self, wanted: Callable[[], bool]) -> str:
        """Of the image, in a thread, for as long as it is `wanted`. Raises DiskError."""
        self._stop = False
        work = asyncio.create_task(asyncio.to_thread(self.disk.checksum, self._read))
        try:
            while not work.done():
                await asyncio.wait((work,), timeout=LOOK_S)
                self._stop = self._stop or not wanted()
            return await work
        finally:
            self._stop = True
            self.progress = ""

    def _read(self, done: int, total: int) -> None:
        if self._stop:
            raise DiskError(f"nobody waits any more for the sum of {self.disk.image}")
        self.progress = f"{amount(done)} of {amount(total)} of the disk's image compared"

    async def note(self, part: Part) -> None:
        """Raises DiskError."""
        await asyncio.to_thread(disk_notes.write, self.disk, part)


class PrimaryDisk(_Side):
    """On the host that the guest runs on."""

    def __init__(self, disk: ColoDisk, monitors: Path = MONITORS) -> None:
        super().__init__(disk, monitors)
        self._told = ""  # by the secondary: the sum, and the line as it would have to be for that host

    def heard(self, detail: str) -> None:
        """The other host's word about its own disk."""
        self._told = detail

    async def begin(self, domid: int, paused: bool, wanted: Callable[[], bool]) -> None:
        """Both images are the same and nobody writes to this one. Raises DiskError."""
        await asyncio.to_thread(disk_notes.spare, self.disk)  # a guest that began anew here knows nothing of overlays
        self.size = await asyncio.to_thread(self.disk.size)
        if not paused:
            raise DiskError(
                "the guest runs, and nobody copies to the other host what it writes now to its disk "
                f"({self.disk.image}): shut it down, make both images the same, and start it paused: xl create -p"
            )
        async with Monitor(domid, self._monitors) as monitor:
            nodes = [str(one["node-name"]) for one in await monitor.do("query-named-block-nodes")]
        if any(node.startswith(NODE) for node in nodes):
            raise DiskError(
                "this QEMU has replicated its disk before, and would not do it again: shut the guest down, make both "
                "images the same, and start it paused: xl create -p"
            )
        theirs, _, line = self._told.partition(" ")
        if line != self.disk.line():
            raise DiskError(f"the other host's configuration has another disk. There: {line}; here: {self.disk.line()}")
        if self.disk.config.compare_image:
            if theirs == UNREAD:
                raise DiskError("compare_image is true here and false on the other host")
            if await self.checksum(wanted) != theirs:
                raise DiskError(
                    f"the images {self.disk.image} on the two hosts differ: copy the good one, with the guest off, and "
                    "start it paused: xl create -p"
                )
        await self.note(Part.PRIMARY)

    async def failure(self, domid: int | None) -> str:
        """Why the secondary's disk is not what this one is, or "". Asked while the PVM stands still.

        libxl asks too, and does not look at the answer (libxl__qmp_query_xen_replication_status() has no callback).
        """
        try:
            if domid is None:
                raise EngineError("the guest is not there")
            async with Monitor(domid, self._monitors) as monitor:
                status = await monitor.do("query-xen-replication-status")
        except EngineError as e:
            self.errors += 1
            return f"nobody can say whether the disk is replicated: {e}"
        if not status["error"]:
            return ""
        self.errors += 1
        return f"what the guest has written has not reached the other host's disk: {status.get('desc', 'no reason')}"


class SecondaryDisk(_Side):
    """On the host that takes the guest in."""

    async def spare(self, guest: Domain | None) -> None:
        """Raises DiskError if a protection would lose what the guest wrote. `guest`: a domain of its name here."""
        await asyncio.to_thread(disk_notes.spare, self.disk)
        if guest is not None:  # the operator may be wrong about which host has the good disk: it is not ours to end
            raise DiskError(
                f"domain {guest.domid} is {guest.name} there, on {self.disk.image}, which another protection would "
                f"overwrite: `coloebpf disks which {self.disk.pair}` names the good image; if it is the other host's: "
                f"xl destroy {guest.name}"
            )

    async def begin(self, wanted: Callable[[], bool]) -> str:
        """Overlays are there, the image is known; what the primary has to know of it. Raises DiskError."""
        await self.prepare()
        total = await self.checksum(wanted) if self.disk.config.compare_image else UNREAD
        return f"{total} {self.disk.line(self.disk.config.listen)}"

    async def prepare(self) -> None:
        """Fresh overlays, just before libxl starts a QEMU on them. Raises DiskError."""
        self.size = await asyncio.to_thread(self.disk.size)
        end_s = asyncio.get_running_loop().time() + QUIT_S
        while await asyncio.to_thread(self.disk.users) and asyncio.get_running_loop().time() < end_s:
            await asyncio.sleep(LOOK_S)  # the QEMU of an SVM that was destroyed
        await asyncio.to_thread(self.disk.prepare)
        await self.note(Part.SECONDARY)

    async def take_over(self, domid: int) -> None:
        """Before libxl makes the SVM the guest. What fails is logged: the guest is worth more than one whole file.

        libxl stops replication without a word of failover: QEMU 7.2 then leaves the overlays as they are, others empty
        them. With it, QEMU brings both together in the image. The PVM's late writes must not come in between.
        """
        await self._try_to_note(Part.TAKING_OVER)
        try:
            async with Monitor(domid, self._monitors) as monitor:
                with contextlib.suppress(EngineError):  # an earlier attempt has stopped it
                    await monitor.do("nbd-server-stop")
                await monitor.do("xen-set-replication", enable=False, primary=False, failover=True)
        except EngineError as e:  # its disk is whole, in three files
            say(logger, logging.ERROR, "QEMU does not bring the disk together", pair=self.disk.pair, error=e)

    async def taken_over(self) -> None:
        """libxl has made the SVM the guest."""
        await self._try_to_note(Part.TAKEN_OVER)

    async def _try_to_note(self, part: Part) -> None:
        try:
            await self.note(part)
        except DiskError as e:
            say(logger, logging.ERROR, "what became of the disk is not noted", pair=self.disk.pair, part=part, error=e)

    async def committed(self, domid: int) -> None:
        """Returns when QEMU has the guest's disk in the image, which is noted. Raises EngineError if it is gone."""
        while True:
            async with Monitor(domid, self._monitors) as monitor:
                error = (await monitor.do("query-xen-replication-status"))["error"]
                nodes = await monitor.do("query-named-block-nodes")
            if not error and str(self.disk.active) not in [one["file"] for one in nodes]:
                break
            await asyncio.sleep(COMMIT_LOOK_S)
        await self.note(Part.COMMITTED)
        say(logger, logging.INFO, "the guest's disk is whole in its image", pair=self.disk.pair, image=self.disk.image)

    async def settle(self, find: Callable[[], Awaitable[Domain | None]]) -> None:
        """Sees to it that the commit is noted, if this host has taken over. `find`: the guest."""
        try:
            note = await asyncio.to_thread(disk_notes.read, self.disk)
            if note is not None and note.part in OPEN and (guest := await find()) is not None:
                await self.committed(guest.domid)
        except EngineError as e:
            sentence = "nobody can say whether the guest's disk is whole in its image"
            say(logger, logging.ERROR, sentence, pair=self.disk.pair, error=e)
