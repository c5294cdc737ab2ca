"""Engine libxl-live on the primary: each checkpoint is a live copy of the PVM into a new domain on the other host.

The order of a checkpoint, and who does what: docs/xen.md. libxl runs in a worker's process, which lets the PVM go on
also when nobody is here to tell it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection

from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import (
    Committed,
    DomainGone,
    Emit,
    EngineEvent,
    Failed,
    Ready,
    Say,
    SecondaryGone,
    Suspended,
)
from coloebpf.service.engines.standby import Standby
from coloebpf.service.engines.xen_copy import Copy
from coloebpf.service.engines.xen_domains import Domains, index_of
from coloebpf.service.engines.xen_pvm import Pvm
from coloebpf.service.log import say
from coloebpf.xen.hold import Hold

WANTED = (State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING)
TEND_S = 0.2
ASK_S = 1.0  # between two questions for a standby
UNDO_S = 5.0  # for a worker that has lost its connection to let the PVM go on
AHEAD_AGAIN_S = 10.0  # from a copy ahead that came to nothing to the next

logger = logging.getLogger("coloebpf.xen")


class XenPrimary:
    """See coloebpf.service.engine.Engine. `state`: the pair's; `here`: ifindex of what has its first NIC's hooks.

    `macs`: of the guest; `lacks`: what this host lacks for it (checks/live.py).
    """

    name = "libxl-live"
    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(
        self,
        domains: Domains,
        emit: Emit,
        tell: Say,
        state: Callable[[], State],
        here: Callable[[], int],
        macs: Collection[str],
        index: Callable[[str], int] = index_of,
        lacks: Callable[[], str] = lambda: "",
    ) -> None:
        self._domains, self._emit_to, self._say_to, self._state = domains, emit, tell, state
        self._here, self._index, self._lacks = here, index, lacks
        self._config = domains.config
        self._pvm = Pvm(domains, self._pvm_event, macs)
        self._standby: Standby | None = None
        self.copy: Copy | None = None
        self._requested = False  # a checkpoint is due
        self._asked = False  # a first one was asked for since the protection began
        self._heard = 0  # number of the last standby that was offered; 0: none was
        self._asked_s = 0.0
        self._precopy = self._config.precopy  # None as soon as it is of no use
        self._not_before_s = 0.0  # for a copy ahead
        self._wake = asyncio.Event()
        self._working: asyncio.Task[None] | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready follows when the guest is there, which may be started later."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._tend()), loop.create_task(self._work())]

    async def request_checkpoint(self) -> None:
        """See Engine."""
        if self.domid is None:
            raise EngineError(f"there is no guest {self._config.domain} on this host")
        if self._requested:
            raise EngineError("a checkpoint is under way")
        self._requested = self._asked = True
        if self.copy is not None:
            self.copy.hurry()
        self._wake.set()

    async def failover(self) -> None:
        """Gives up the secondary; Ready follows, another SVM could be made."""
        self._asked = False
        self._standby = None
        await self._give_up("the secondary is given up")
        if self.domid is not None:
            asyncio.get_running_loop().call_soon(self._emit, Ready())

    async def stop(self) -> None:
        """See Engine. A PVM that stands still goes on."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._domains.end()

    async def guest_lives(self) -> bool:
        """See Inquiring."""
        return await self._pvm.lives()

    @property
    def progress(self) -> str:
        """See Showing."""
        return self.copy.progress if self.copy is not None else ""

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        copy = self.copy if self.copy is not None and self.copy.number == number else None
        match word:
            case "standby":
                self._heard = number
                if copy is not None:
                    return  # offered twice
                self._standby = Standby.of(number, detail, self._domains.encryption)
                if self.copy is not None:
                    self.copy.fail("the secondary has another standby")
                self._wake.set()
            case "whole" | "lost" if copy:
                copy.heard(word, detail)
            case "unfit":
                self._emit(Failed(f"the other host: {detail}", fatal=True))
                self._emit(Ready())
            case "gone":
                self._emit(SecondaryGone(detail))

    def peer_up(self) -> None:
        """See Talking."""
        if self.copy is not None:
            self.copy.fail("the link was down meanwhile")
        self._standby = None
        self._asked_s = 0.0

    # ---- the PVM ---------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            if self._domains.changes.due(self._may_stand()):
                await self._pvm.look(self._may_stand)
            wanted = self._state() in WANTED
            if not wanted:
                self._standby = None  # the secondary ends it too
            if not wanted and self._asked:
                self._asked = False
                await self._give_up("the protection has ended")
                if self.domid is not None:
                    self._emit(Ready())  # for the next protection: after a fatal failure nobody expects it
            now = asyncio.get_running_loop().time()
            if wanted and self._standby is None and self.copy is None and now - self._asked_s > ASK_S:
                self._asked_s = now
                self._say_to("ask", self._heard, "")
            if self._standby is not None and self.copy is None and self._ahead():
                self._wake.set()
            await self._domains.changes.wait(TEND_S)

    def _may_stand(self) -> bool:
        return self._working is not None or self._state() is State.UNPROTECTED

    @property
    def domid(self) -> int | None:
        """Of the PVM, if it is there."""
        return self._pvm.domid

    def _pvm_event(self, event: EngineEvent) -> None:
        if isinstance(event, DomainGone | SecondaryGone) and self.copy is not None:
            self.copy.fail(event.reason)
        self._emit(event)

    async def _refusal(self, domid: int) -> str:
        """Why this guest can't be protected, or "". Raises XenError."""
        if lacks := await asyncio.to_thread(self._lacks):
            return lacks
        if wrong := await self._domains.unfit(domid):
            return "; ".join(f"{one.text} ({one.advice})" for one in wrong)
        slot = await self._domains.slot_of(domid)
        if slot is None or self._index(self._domains.vifs(slot)[0]) != self._here():
            other = self._domains.ports(1 - (slot or 0))[0]
            return f"the guest is not behind the port that is compared: start it with bridge={other}"
        return ""

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self.domid is None or self._standby is None or not (self._requested or self._ahead()):
                continue
            standby, self._standby = self._standby, None
            hold = (
                None if self._requested or self._precopy is None else Hold(self._domains.home / "hold", self._precopy)
            )
            self.copy = copy = Copy(standby, self._switch, self._suspend, hold)
            self._working = asyncio.get_running_loop().create_task(self._make(copy, self.domid))
            try:
                await asyncio.wait((self._working,))
            except asyncio.CancelledError:
                self._working.cancel()
                await asyncio.wait((self._working,))
                raise
            self.copy = self._working = None
            self._wake.set()

    def _ahead(self) -> bool:
        """A copy is begun that nobody has asked for yet: when that happens, only its rest is missing."""
        if self._precopy is None or self._state() is not State.LOCKSTEP:
            return False
        return asyncio.get_running_loop().time() >= self._not_before_s

    async def _make(self, copy: Copy, domid: int) -> None:
        try:
            await self._checkpoint(copy, domid)
        except EngineError as e:
            copy.fail(str(e))
            self._say_to("discard", copy.number, "")
            say(logger, logging.WARNING, "a copy came to nothing", pair=self._domains.pair, reason=e)
            if self._requested or copy.suspended:
                self._requested = False
                self._emit(Failed(str(e), fatal=bool(copy.refused)))
                if copy.refused:
                    self._emit(Ready())  # for the next protection, when that is mended
            else:
                self._not_before_s = asyncio.get_running_loop().time() + AHEAD_AGAIN_S
        except asyncio.CancelledError:
            copy.fail("given up")
            self._say_to("discard", copy.number, "")
            raise

    async def _checkpoint(self, copy: Copy, domid: int) -> None:
        if refusal := await self._refusal(domid):
            copy.refused = refusal
            raise EngineError(refusal)
        worker = await self._domains.worker("copy")
        try:
            await copy.write(worker, domid, self._config.copy_timeout_s, self._config.step_timeout_s)
        except EngineError:
            await worker.end()
            await self._go_on(domid)
            raise
        finally:
            await worker.end()
        await copy.whole(self._config.step_timeout_s)
        self._requested = False
        self._emit(Committed())
        self._say_to("go", copy.number, "")

    async def _go_on(self, domid: int) -> None:
        """If the worker could not see to it; the next look tries again."""
        guest = await self._domains.numbered(domid)
        if guest is not None and guest.suspended:
            await self._pvm.let_go_on(domid)

    def _switch(self, copy: Copy) -> None:
        """Client frames go to the new domain's port from here on, where they wait; the old SVM proves nothing more."""
        if not copy.switching:
            copy.switching = True
            self._say_to("switch", copy.number, "")

    def _suspend(self, copy: Copy) -> None:
        """All that the PVM has sent so far is in the copy, and its QEMU stands still too."""
        self._switch(copy)
        if copy.kept:
            self._precopy = None
            why = "it ended by itself: is the library for this libxl? (docs/xen.md)"
            say(logger, logging.ERROR, "memory is not copied ahead any more", pair=self._domains.pair, why=why)
        copy.suspended = True
        self._emit(Suspended(requested=self._requested))

    async def _give_up(self, reason: str) -> None:
        self._requested = False
        if self.copy is not None:
            self.copy.fail(reason)
        if self._working is not None:
            await asyncio.wait((self._working,), timeout=UNDO_S)

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)
