"""Engines libxl-colo and libxl-remus on the primary: `xl remus`, and a relay that its stream goes through.

libxl makes the checkpoints, in place; docs/libxl-colo.md has who does what when. What libxl would do too early, the
relay keeps back until this engine's events have been dealt with: so no step rests on how long a process takes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence

from coloebpf.errors import EngineError, XenError
from coloebpf.model import State
from coloebpf.service.disks import Usage
from coloebpf.service.engine import (
    Committed,
    Emit,
    EngineEvent,
    Failed,
    Overwriting,
    Ready,
    Say,
    SecondaryGone,
    Suspended,
)
from coloebpf.service.engines.standby import Standby
from coloebpf.service.engines.xen_primary import TEND_S, WANTED
from coloebpf.service.engines.xen_pvm import Pvm
from coloebpf.service.engines.xen_relay import Relay
from coloebpf.service.engines.xen_stream import Stream
from coloebpf.service.engines.xl_disk import PrimaryDisk
from coloebpf.service.engines.xl_owed import Owed
from coloebpf.service.engines.xl_refusal import Refusal
from coloebpf.service.engines.xl_seeking import Seeking
from coloebpf.service.engines.xl_sending import END_S, Sending
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks
from coloebpf.xen.records import Mark
from coloebpf.xen.watcher import Watcher

MIB = 1 << 20
# An error of libxenguest (deploy/xen/edits/tools/40-secondary-dirty-pages.patch), which Debian's has.
BLIND = (
    "the secondary's libxenguest does not tell which pages its VM has written, so no checkpoint would make that one a "
    "copy again: install what deploy/xen/rebuild.sh makes there too"
)

logger = logging.getLogger("coloebpf.xen")


class XlPrimary:
    """See coloebpf.service.engine.Engine. `ports`, `macs`: of the guest's NICs; `state`: the pair's."""

    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(
        self,
        stream: Stream,
        watcher: Watcher,
        ports: Sequence[str],
        macs: Collection[str],
        emit: Emit,
        tell: Say,
        state: Callable[[], State],
        lacks: Callable[[], str] = lambda: "",
    ) -> None:
        self.name = "libxl-colo" if stream.colo else "libxl-remus"
        self._stream, self._emit_to, self._state = stream, emit, state
        self._tools = stream.toolstack(watcher)
        self.pvm = Pvm(self._tools, self._pvm_event, macs)
        self._disk = PrimaryDisk(stream.disk, stream.monitors) if stream.disk is not None else None
        self._refusal = Refusal(stream, self._tools, self.pvm, ports, self._disk, lacks)
        self._seeking = Seeking(tell, stream.encryption)
        self._sending = Sending(stream)
        self._relay: Relay | None = None
        self._begun = False  # a stream was asked for since the protection began
        self._requested = False  # a checkpoint is due
        self._under_way = False  # libxl makes one
        self._first = True
        self._ending = ""  # why this engine has ended the stream
        self._streams = 0  # that were begun here
        self._owed = Owed(self._commit)
        self._tasks = Tasks(lambda error: logger.error("a task of the engine failed", exc_info=error))
        self._stopped = False

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready follows when the guest is there, which may be started later. A stream that runs goes on."""
        self._relay = await Relay.find(self._stream.home, self._at, self._cut, self._over)
        if self._relay is not None:
            met = self._relay.met
            ready = met.get(Mark.READY, 0) - self._relay.held.count(Mark.READY)
            self._begun, self._first, self._under_way = True, not ready, met.get(Mark.NEW, 0) >= ready
            self.pvm.owed = bool(ready) and not met.get(Mark.NEW, 0)
            self._owed = Owed(self._commit, met.get(Mark.WHOLE, 0))
            self._say_it(logging.INFO, "went on with the stream", **{str(mark): n for mark, n in met.items()})
            for mark in self._relay.held:
                self._at(mark, True)
            self._relay.listen()
        if self._disk is not None:
            self._tasks.spawn(self._disk.learn())
        self._tasks.spawn(self._tend())

    async def request_checkpoint(self) -> None:
        """The first one begins the stream. One that libxl makes already is as good as one that was asked for."""
        if self.pvm.domid is None:
            raise EngineError(f"there is no guest {self._stream.domain} on this host")
        self._requested = self._begun = True
        if self._relay is not None and self._stream.colo and not self._under_way:
            self._relay.checkpoint()

    async def failover(self) -> None:
        """Gives up the secondary; Ready follows, another stream could begin."""
        await self._end("the secondary is given up")
        self._begun = False
        if self.pvm.domid is not None:
            asyncio.get_running_loop().call_soon(self._emit, Ready())

    async def stop(self) -> None:
        """See Engine. The stream goes on, for the next service: what it waits for, waits."""
        self._stopped = True
        await self._tasks.end()
        if self._relay is not None:
            await self._relay.let_go()
        await self._tools.end()

    async def guest_lives(self) -> bool:
        """See Inquiring."""
        return await self.pvm.lives()

    @property
    def progress(self) -> str:
        """See Showing."""
        if self._disk is not None and self._disk.progress:
            return self._disk.progress
        if self._relay is None:
            return "waiting for the secondary" if self._begun else ""
        return f"{self._relay.passed // MIB} MiB sent" if self._first or self._under_way else ""

    def disk_usage(self) -> Usage | None:
        """See Storing."""
        follows = self._relay is not None and not self._first
        return self._disk.usage(follows, self._state()) if self._disk is not None else None

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        match word:
            case "standby":
                self._seeking.offered(number, detail)
            case "disk" if self._disk is not None:
                self._disk.heard(detail)
            case "whole":
                self._owed.there(number)
            case "unfit":
                self._emit(Failed(f"the other host: {detail}", fatal=True))
                self._emit(Ready())
            case "gone":
                self._tasks.spawn(self._end(detail))
                self._emit(SecondaryGone(detail))

    def peer_up(self) -> None:
        """See Talking."""
        self._seeking.peer_up()

    # ---- the PVM, and when there is to be a stream -----------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            if self._tools.changes.due(self._may_stand()):
                await self.pvm.look(self._may_stand)
            if not self._wanted():
                self._seeking.found = None
                if self._begun:
                    self._begun = False
                    await self._end("the protection has ended")
                    if self.pvm.domid is not None:
                        self._emit(Ready())
            elif self._relay is None and self._seeking.found is None:
                self._seeking.ask()
            elif self._relay is None and self._requested and self.pvm.domid is not None:
                await self._begin(self.pvm.domid)
            await self._tools.changes.wait(TEND_S)

    def _wanted(self) -> bool:
        return self._state() in WANTED

    def _may_stand(self) -> bool:
        return self._relay is not None or self._sending.alive

    def _pvm_event(self, event: EngineEvent) -> None:
        if isinstance(event, SecondaryGone):
            self._tasks.spawn(self._end(event.reason))
        self._emit(event)

    async def _begin(self, domid: int) -> None:
        standby = self._seeking.take()
        try:
            refusal = await self._refusal.reason(domid, self._wanted)
            if not self._wanted():
                return  # it took its time
            if refusal:
                self._requested = False
                self._emit(Failed(refusal, fatal=True))
                self._emit(Ready())  # for the next protection, when that is mended
                return
            await self._connect(standby, domid)
        except EngineError as e:
            self._requested = False
            self._emit(Failed(str(e)))

    async def _connect(self, standby: Standby, domid: int) -> None:
        self._ending, self._first, self._under_way = "", True, True
        self._streams += 1
        self._owed = Owed(self._commit)
        with await standby.reach() as net:
            self._relay = await self._sending.begin(domid, net, self._at, self._cut, self._over)
        self._relay.listen()
        self._say_it(logging.INFO, "libxl sends the guest", domain=domid)

    # ---- what the relay meets --------------------------------------------------------------------------------------

    def _at(self, mark: Mark, held: bool) -> None:
        relay = self._relay
        if relay is None:
            return
        match mark:
            case Mark.NEW:
                self._under_way, self.pvm.owed = True, False
                self._emit(Overwriting(self._requested))
            case Mark.READY:
                self._tasks.spawn(self._ready(relay))
                return
            case Mark.STILL | Mark.NEXT if held:
                self._tasks.spawn(self._stands(relay, mark))
                return
            case Mark.SURE:
                self._owed.sure()
            case Mark.WHOLE:
                self._owed.whole()
            case Mark.BLIND:
                self._tasks.spawn(self._end(BLIND))
                self._emit(Failed(BLIND, fatal=True))
            case Mark.RESUMED:
                self._under_way = False
                if self._requested:
                    relay.checkpoint()  # was asked for in the middle of one
        if held:
            relay.go(mark)

    async def _ready(self, relay: Relay) -> None:
        """COLO: the PVM stands still and the secondary has all of it. When this passes, libxl lets the PVM go on."""
        if self.pvm.domid is None:  # this service has just come
            await self.pvm.look(self._may_stand)
        if self._first:
            await self.pvm.pause()  # libxl unpauses it behind the first one: an error for a guest that was not paused
        elif self._disk is not None:
            failure = await self._disk.failure(self.pvm.domid)
            if relay is not self._relay:
                return
            if failure:
                self._tasks.spawn(self._end(failure))
                self._emit(Failed(failure, fatal=True))
                return
        self.pvm.owed = self.pvm.owed or self._first
        self._tell_suspended()
        self._commit()
        relay.go(Mark.READY)

    async def _stands(self, relay: Relay, mark: Mark) -> None:
        """Remus: what the PVM has sent so far belongs to this checkpoint; it goes on when libxl has written it."""
        owed = self._owed
        await owed.settled()
        if relay is self._relay:
            owed.stood()
            self._tell_suspended()
            relay.go(mark)

    def _tell_suspended(self) -> None:
        self._emit(Suspended(requested=self._requested or not self._stream.colo))
        self._requested = False

    def _commit(self) -> None:
        self._first = False
        self._emit(Committed())

    def _cut(self, why: str) -> None:
        self._say_it(logging.WARNING, "the stream's connection is cut", why=why)

    def _over(self, why: str) -> None:
        self._relay = None
        self._under_way = False
        if not self._stopped:
            self._tasks.spawn(self._ended(why))

    async def _ended(self, why: str) -> None:
        """xl lets the PVM go on at its end, whatever that was."""
        stream = self._streams
        await self._sending.end()
        await self.pvm.run()
        if self._ending:
            return
        try:
            lives, nobody = await self.pvm.lives(), ""
        except XenError as e:
            lives, nobody = False, str(e)
        if self._ending or stream != self._streams:
            return  # the protection has ended meanwhile, or another one has begun
        self._requested = False
        if nobody:
            text = f"libxl has ended ({why}), and nobody can say whether the guest lives: {nobody}"
            self._emit(Failed(text, fatal=True))
        elif lives:
            self._emit(SecondaryGone(f"libxl has ended ({why})"))
        else:
            self._say_it(logging.WARNING, "libxl has ended, and the guest too", why=why)
            await self.pvm.look(self._may_stand)

    async def _end(self, why: str) -> None:
        self._requested = False
        self._ending = why
        if (relay := self._relay) is None:
            return
        self._say_it(logging.INFO, "the stream ends", why=why)
        relay.end()
        await asyncio.wait((relay.over,), timeout=END_S)
        await self._sending.end()
        await self.pvm.run()

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)

    def _say_it(self, level: int, sentence: str, **fields: object) -> None:
        say(logger, level, sentence, pair=self._stream.pair, **fields)
