"""Engines libxl-colo and libxl-remus on the secondary: `xl migrate-receive`, behind a relay.

libxl makes the SVM the guest when its stream ends, and asks nobody; so the relay lets it end when this engine says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine, Sequence

from coloebpf.errors import DeviceError, DiskError, EngineError, XenError
from coloebpf.model import State
from coloebpf.service.disks import Usage
from coloebpf.service.engine import DomainGone, Emit, EngineEvent, Ready, Replacing, Say
from coloebpf.service.engines.standby import Door, new_token
from coloebpf.service.engines.xen_places import Ports
from coloebpf.service.engines.xen_primary import TEND_S, WANTED
from coloebpf.service.engines.xen_relay import RUNE, SOCKET, Relay, arrives, launch
from coloebpf.service.engines.xen_stream import Stream
from coloebpf.service.engines.xl_disk import SecondaryDisk
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks
from coloebpf.xen.libxl import Domain
from coloebpf.xen.records import Mark
from coloebpf.xen.watcher import Watcher

RETRY_S = 1.0
START_S = 10.0  # for a relay, which is a Python that starts

logger = logging.getLogger("coloebpf.xen")


class XlSecondary:
    """See coloebpf.service.engine.Engine. `vifs`: what the SVM's NICs are behind; `state`: the pair's.

    `lacks`: what this host lacks for it (checks/live.py).
    """

    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(
        self,
        stream: Stream,
        watcher: Watcher,
        vifs: Sequence[str],
        ports: Ports,
        emit: Emit,
        tell: Say,
        state: Callable[[], State],
        lacks: Callable[[], str] = lambda: "",
    ) -> None:
        self.name = "libxl-colo" if stream.colo else "libxl-remus"
        self._stream, self._vifs, self._ports = stream, vifs, ports
        self._emit_to, self._say_to, self._state, self._lacks = emit, tell, state, lacks
        self._tools = stream.toolstack(watcher)
        self._door = Door(stream.pair, stream.listen, lambda: self._token, self._take)
        self._disk = SecondaryDisk(stream.disk, stream.monitors) if stream.disk is not None else None
        self._token: str | None = None  # of the standby that is offered
        self._number = 0
        self._numbers = itertools.count(1 + secrets.randbelow(1 << 30))
        self._relay: Relay | None = None
        self._taking: asyncio.Task[None] | None = None
        self._svm: Domain | None = None  # as it was seen last; its number and UUID stay when libxl renames it
        self._ours = False  # the end of the stream is this engine's doing
        self._mine = False  # by a failover the SVM has become the guest
        self._wholes = 0  # Remus: checkpoints that are here
        self._tasks = Tasks(lambda error: logger.error("a task of the engine failed", exc_info=error))
        self._stopped = False

    @property
    def relay(self) -> Relay | None:
        """What the SVM is kept up to date by."""
        return self._relay

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready when libxl has answered. A stream that runs goes on. Raises EngineError if it can't listen."""
        await self._tools.all()
        self._relay = await Relay.find(self._stream.home, self._at, self._cut, self._over)
        if self._relay is not None:
            self._wholes = self._relay.met.get(Mark.WHOLE, 0)
            self._log(logging.INFO, "went on with the stream", cut=self._relay.cut or "no")
            for mark in self._relay.held:
                self._at(mark, True)
            self._relay.listen()
        self._mine = self._state() is State.PROMOTED
        self._door.open()
        if self._mine:
            self._tasks.spawn(self._see_committed())
        self._tasks.spawn(self._tend())
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Raises EngineError: only the primary's can be asked."""
        raise EngineError("the primary makes the checkpoints")

    async def failover(self) -> None:
        """Ends the stream, and returns when libxl has made the SVM the guest. Raises EngineError if it has not."""
        relay = self._relay
        if relay is None:
            raise EngineError("there is no SVM")
        svm = self._svm
        if self._disk is not None and svm is None and (svm := await self._tools.named(self._stream.incoming)) is None:
            raise EngineError(f"there is no {self._stream.incoming} whose disk could be taken over")
        self._mine = self._ours = True
        if self._disk is not None and svm is not None:
            await self._disk.take_over(svm.domid)
        relay.end()
        await asyncio.wait((relay.over,), timeout=self._stream.step_timeout_s)
        if not relay.over.done():
            raise EngineError(f"libxl has not taken over in {self._stream.step_timeout_s} s")
        guest = await self._taken_over()
        if guest is None:
            raise EngineError(f"libxl has not taken over: {relay.over.result()}")
        await self._release()
        self._log(logging.INFO, "libxl has made the SVM the guest", domain=guest.domid)
        if self._disk is not None:
            await self._disk.taken_over()
            self._tasks.spawn(self._see_committed())

    async def _taken_over(self) -> Domain | None:
        """Running, whatever its name: libxl goes on when it can't rename it."""
        domains = [domain for domain in await self._tools.all() if not domain.ended]
        guest = next((domain for domain in domains if domain.name == self._stream.domain), None)
        if guest is None:
            guest = next((domain for domain in domains if domain.name == self._stream.incoming), None)
            if guest is None or guest.paused or guest.suspended:
                return None
            name = f"xl rename {guest.name} {self._stream.domain}"
            self._log(logging.ERROR, "the guest runs, and libxl has not given it its name", domain=guest.domid, do=name)
        return guest

    async def stop(self) -> None:
        """See Engine. The SVM goes on, and its stream."""
        self._stopped = True
        await self._door.close()
        await self._tasks.end()
        if self._relay is not None:
            await self._relay.let_go()
        await self._tools.end()

    @property
    def progress(self) -> str:
        """See Showing."""
        return self._disk.progress if self._disk is not None else ""

    def disk_usage(self) -> Usage | None:
        """See Storing."""
        return self._disk.usage() if self._disk is not None else None

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        if word == "ask":
            self._offer()

    def peer_up(self) -> None:
        """See Talking."""
        if not self._stream.colo and self._wholes:
            self._say_to("whole", self._wholes, "")

    # ---- taking in -------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            state = self._state()
            try:
                if self._tools.changes.due(self._relay):
                    await self._look()
                if self._disk is not None and state is not State.SYNCING:
                    self._disk.refused = ""
                if state is State.SYNCING and self._relay is None and self._taking is None and self._token is None:
                    await self._make_ready()
                elif state is State.SYNCING and self._relay is not None and self._relay.cut:
                    await self._drop("its stream was cut")
                elif state is State.UNPROTECTED and not self._mine:
                    self._token = None
                    await self._drop("the protection has ended")
            except EngineError as e:
                self._log(logging.WARNING, "there is no standby", error=e)
                self._tools.changes.again()
                await asyncio.sleep(RETRY_S)
            await self._tools.changes.wait(TEND_S)

    async def _look(self) -> None:
        """What libxl, or anybody, has done to the SVM without a word of ours. Raises XenError."""
        relay = self._relay
        if relay is None:
            self._svm = None
            return
        domains = await self._tools.all()
        if relay is not self._relay or self._ours:
            return
        if self._svm is None:
            self._svm = next((one for one in domains if one.name == self._stream.incoming and not one.ended), None)
            return
        known = (self._svm.domid, self._svm.uuid)
        now = next((one for one in domains if (one.domid, one.uuid) == known and not one.ended), None)
        if now is None:
            self._lose(relay, "the SVM is gone")
        elif now.name == self._stream.domain:
            self._lose(relay, "libxl has made the SVM the guest, which nobody has asked for")

    def _lose(self, relay: Relay, why: str) -> None:
        """The stream is of no use any more: what came would make it the guest, or another SVM."""
        self._ours = True
        relay.kill()
        self._say_to("gone", 0, why)
        self._emit(DomainGone(why))

    async def _make_ready(self) -> None:
        """A standby that the primary may take. Raises EngineError."""
        disk = self._disk
        if disk is not None and disk.refused:
            return
        if disk is not None and not await self._passes(disk.spare()):
            return
        self._mine = False  # whoever was the guest here: another protection begins
        if lacks := await asyncio.to_thread(self._lacks):
            self._say_to("unfit", 0, lacks)
            raise EngineError(lacks)
        await self._clear()
        if disk is not None and not await self._passes(disk.begin(lambda: self._state() is State.SYNCING)):
            return
        self._token, self._number = new_token(), next(self._numbers)
        self._offer()

    async def _passes(self, step: Coroutine[object, object, None]) -> bool:
        """Of the disk; what is wrong with it is told once, until another protection begins."""
        assert self._disk is not None
        try:
            await step
        except DiskError as e:
            self._disk.refused = str(e)
            self._log(logging.ERROR, "the disk is not as it has to be", error=e)
            self._offer()
            return False
        return True

    def _offer(self) -> None:
        if self._disk is not None and self._disk.refused and self._state() is State.SYNCING:
            self._say_to("unfit", 0, self._disk.refused)
        if self._token is not None and self._state() in WANTED:
            if self._disk is not None:
                self._say_to("disk", self._number, self._disk.word)
            self._say_to(
                "standby", self._number, f"{self._stream.listen.host} {self._stream.listen.port} {self._token}"
            )

    async def _clear(self) -> None:
        """The guest runs on the other host for certain: what has its name here, or is half of it, goes."""
        for name in (self._stream.incoming, self._stream.domain):
            if (old := await self._tools.named(name)) is not None:
                self._log(logging.WARNING, "an older copy is destroyed", domain=old.domid, name=name)
                await self._tools.destroy(old.domid)

    def _take(self, connection: socket.socket) -> None:
        self._token = None
        self._taking = self._tasks.spawn(self._take_in(connection))

    async def _take_in(self, connection: socket.socket) -> None:
        stream = self._stream
        self._ours, self._wholes = False, 0
        try:
            with connection:
                if self._disk is not None:
                    await self._disk.prepare()
                process = await launch(stream.home, [*RUNE, str(stream.home / SOCKET)])
                relay = await arrives(stream.home, process, START_S, self._at, self._cut, self._over)
                self._relay = relay
                relay.start(connection, stream.colo, argv=stream.taking_in())
            relay.listen()
            self._log(logging.INFO, "libxl takes the guest in")
        except EngineError as e:
            self._relay = None
            self._say_to("gone", 0, str(e))
        finally:
            self._taking = None

    # ---- what the relay meets --------------------------------------------------------------------------------------

    def _at(self, mark: Mark, held: bool) -> None:
        match mark:
            case Mark.STILL if self._stream.colo and self._state() is State.SYNCING:
                self._tasks.spawn(self._hold())
                self._emit(Replacing())
            case Mark.NEW:
                if self._state() not in WANTED:
                    return  # it stays as it is, until somebody says what becomes of it
                self._emit(Replacing())
            case Mark.RESUMED:
                self._tasks.spawn(self._release())
            case Mark.WHOLE if not self._stream.colo:
                self._wholes += 1
                self._say_to("whole", self._wholes, "")
        if held and self._relay is not None:
            self._relay.go(mark)

    async def _hold(self) -> None:
        """Frames for the SVM that come before its NIC is there, or before it runs, wait."""
        try:
            for vif in self._vifs:
                await asyncio.to_thread(self._ports.hold, vif)
        except DeviceError as e:  # they are lost: a frame lost on fwd is no worse
            self._log(logging.ERROR, "frames for the SVM are not kept", error=e)

    async def _release(self) -> None:
        for vif in self._vifs:
            with contextlib.suppress(DeviceError):  # nothing was held
                await asyncio.to_thread(self._ports.release, vif)

    async def _see_committed(self) -> None:
        disk = self._disk
        try:
            if disk is not None and await disk.pending() and (guest := await self._tools.guest()) is not None:
                await disk.committed(guest.domid)
        except EngineError as e:
            self._log(logging.ERROR, "nobody can say whether the guest's disk is whole in its image", error=e)

    def _cut(self, why: str) -> None:
        self._log(logging.WARNING, "the stream is cut; the SVM stays what it is until it is clear who speaks", why=why)

    def _over(self, why: str) -> None:
        self._relay = None
        if not self._stopped and not self._ours:
            self._say_to("gone", 0, f"the secondary's libxl has ended: {why}")
            self._emit(DomainGone(f"libxl has ended: {why}"))
            self._tasks.spawn(self._tell_fate())

    async def _tell_fate(self) -> None:
        """libxl decides by itself what becomes of the SVM when its stream fails. The dataplane keeps it silent."""
        try:
            names = {one.name: one.domid for one in await self._tools.all() if not one.ended}
        except XenError as e:
            self._log(logging.ERROR, "nobody can say what libxl has done to the SVM", error=e)
            return
        if self._stream.domain in names:
            fate = "made it the guest: it runs, without a voice, until the next protection or xl destroy"
        elif self._stream.incoming in names:
            fate = "left it: it ends with the next protection"
        else:
            fate = "destroyed it"
        self._log(logging.ERROR, "what libxl has done to the SVM", fate=fate)

    async def _drop(self, why: str) -> None:
        """The SVM is not needed any more."""
        relay = self._relay
        if relay is None:
            return
        self._log(logging.INFO, "the SVM ends", why=why)
        self._ours = True
        relay.kill()
        await asyncio.wait((relay.over,), timeout=self._stream.step_timeout_s)
        with contextlib.suppress(XenError):
            if (svm := await self._tools.named(self._stream.incoming)) is not None:
                await self._tools.destroy(svm.domid)
        await self._release()

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)

    def _log(self, level: int, sentence: str, **fields: object) -> None:
        say(logger, level, sentence, pair=self._stream.pair, **fields)
