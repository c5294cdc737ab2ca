"""Engines libxl-colo and libxl-remus on the secondary: `xl migrate-receive`, behind a relay.

libxl makes the SVM the guest when its stream ends, and asks nobody; so the relay lets it end when this engine says so.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable, Sequence

from coloebpf.errors import DeviceError, DiskError, EngineError, XenError
from coloebpf.model import State
from coloebpf.service.disks import Usage
from coloebpf.service.engine import DomainGone, Emit, EngineEvent, Ready, Replacing, Say
from coloebpf.service.engines.xen_places import Ports
from coloebpf.service.engines.xen_primary import TEND_S, WANTED
from coloebpf.service.engines.xen_relay import RUNE, SOCKET, Relay, arrives, launch
from coloebpf.service.engines.xen_stream import Stream
from coloebpf.service.engines.xen_svm import Svm
from coloebpf.service.engines.xl_disk import SecondaryDisk
from coloebpf.service.engines.xl_offering import Offering
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks
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
        self.svm = Svm(self._tools, stream.incoming)
        self._offering = Offering(stream, tell, state, self._take)
        self._disk = SecondaryDisk(stream.disk, stream.monitors) if stream.disk is not None else None
        self._relay: Relay | None = None
        self._taking: asyncio.Task[None] | None = None
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
        self._offering.open()
        if self._disk is not None:
            self._tasks.spawn(self._disk.learn())
        if self._disk is not None and self._mine:
            self._tasks.spawn(self._disk.settle(self.svm.guest))
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
        svm = await self._tools.named(self._stream.incoming) if self._disk is not None else None
        if self._disk is not None and svm is None:
            raise EngineError(f"there is no {self._stream.incoming} whose disk could be taken over")
        self._mine = self._ours = True
        if self._disk is not None and svm is not None:
            await self._disk.take_over(svm.domid)
        relay.end()
        await asyncio.wait((relay.over,), timeout=self._stream.step_timeout_s)
        if not relay.over.done():
            raise EngineError(f"libxl has not taken over in {self._stream.step_timeout_s} s")
        guest = await self.svm.guest()
        if guest is None:
            raise EngineError(f"libxl has not taken over: {relay.over.result()}")
        await self._release()
        self._log(logging.INFO, "libxl has made the SVM the guest", domain=guest.domid)
        if self._disk is not None:
            await self._disk.taken_over()
            self._tasks.spawn(self._disk.settle(self.svm.guest))

    async def stop(self) -> None:
        """See Engine. The SVM goes on, and its stream."""
        self._stopped = True
        await self._offering.close()
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
        if self._disk is None:
            return None
        state = self._state()
        follows = self._relay is not None and not self._relay.cut and state in (State.LOCKSTEP, State.CHECKPOINTING)
        return self._disk.usage(follows, state)

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        if word == "ask":
            self._offering.tell()

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
                if state is State.SYNCING and self._relay is None and self._taking is None and not self._offering.there:
                    await self._make_ready()
                elif state is State.SYNCING and self._relay is not None and self._relay.cut:
                    await self._drop("its stream was cut")
                elif state is State.UNPROTECTED and not self._mine:
                    self._offering.withdraw()
                    await self._drop("the protection has ended")
            except EngineError as e:
                self._log(logging.WARNING, "there is no standby", error=e)
                self._tools.changes.again()
                await asyncio.sleep(RETRY_S)
            await self._tools.changes.wait(TEND_S)

    async def _look(self) -> None:
        """Raises XenError."""
        relay = self._relay
        if relay is None:
            self.svm.forget()
        elif (why := await self.svm.look()) and relay is self._relay and not self._ours:
            self._lose(relay, why)

    def _lose(self, relay: Relay, why: str) -> None:
        """The stream is of no use any more: what came would make it the guest, or another SVM."""
        self._ours = True
        relay.kill()
        self._say_to("gone", 0, why)
        self._emit(DomainGone(why))

    async def _make_ready(self) -> None:
        """A standby that the primary may take. Raises EngineError; what has to be mended is told to the primary."""
        if lacks := await asyncio.to_thread(self._lacks):
            self._say_to("unfit", 0, lacks)
            raise EngineError(lacks)
        disk, word = self._disk, ""
        try:
            if disk is not None:
                await disk.spare(await self._tools.guest())
            self._mine = False  # whoever was the guest here: another protection begins
            await self._clear()
            if disk is not None:
                word = await disk.begin(lambda: self._state() is State.SYNCING)
        except DiskError as e:
            self._say_to("unfit", 0, str(e))
            raise
        self._wholes = 0
        self._offering.renew(word)

    async def _clear(self) -> None:
        """The guest runs on the other host for certain: what has its name here, or is half of it, goes."""
        for name in (self._stream.incoming, self._stream.domain):
            if (old := await self._tools.named(name)) is not None:
                self._log(logging.WARNING, "an older copy is destroyed", domain=old.domid, name=name)
                await self._tools.destroy(old.domid)

    def _take(self, connection: socket.socket) -> None:
        self._taking = self._tasks.spawn(self._take_in(connection))

    async def _take_in(self, connection: socket.socket) -> None:
        stream = self._stream
        self._ours = False
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

    def _cut(self, why: str) -> None:
        self._log(logging.WARNING, "the stream is cut; the SVM stays what it is until it is clear who speaks", why=why)

    def _over(self, why: str) -> None:
        self._relay = None
        if not self._stopped and not self._ours:
            self._say_to("gone", 0, f"the secondary's libxl has ended: {why}")
            self._emit(DomainGone(f"libxl has ended: {why}"))
            self._tasks.spawn(self._tell_fate())
            self._tasks.spawn(self._release())  # it may have ended before the SVM ran

    async def _tell_fate(self) -> None:
        try:
            await self.svm.tell_fate()
        except XenError as e:
            self._log(logging.ERROR, "nobody can say what libxl has done to the SVM", error=e)

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
