"""Copy after copy of the PVM's memory, and the order of the checkpoint that each one ends in, or how it is undone.

Steps of _checkpoint() are those of the table in docs/qemu.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.engine import Committed, Emit, Failed, Say, Suspended
from coloebpf.service.engines.qemu_copy import Copy
from coloebpf.service.engines.qemu_filling import RUNNING, Filling, progress
from coloebpf.service.engines.qemu_mirror import Mirrors, refusal
from coloebpf.service.engines.qemu_pvm import Pvm
from coloebpf.service.engines.standby import Standby
from coloebpf.service.log import say

SWITCH_S = 1.0  # for the secondary: one write into a map
STOP_S = 2.0  # from the open gate to the PVM's standstill
MOVE_S = 2.0  # for the PVM's rest to leave QEMU; so long the PVM may stand still
WHOLE_S = 5.0  # for the standby to load it
CUT_S = 1.0  # for the secondary: one command; the PVM stands still meanwhile
UNDO_S = 1.0
RELEASE_S = 5.0  # for each later try to let the PVM go on

logger = logging.getLogger("coloebpf.qemu")


class Checkpoints:
    """Of one pair. `pvm`: returns it if it may be copied now; `pace`: bytes per second, of a copy nobody waits for.

    `wake` is set when a copy may begin, or the one under way should look again.
    """

    def __init__(
        self, pair: str, pace: int, mirrors: Mirrors, pvm: Callable[[], Pvm | None], emit: Emit, tell: Say
    ) -> None:
        self._pair, self._pace, self._mirrors, self._pvm, self._emit, self._say_to = (
            pair, pace, mirrors, pvm, emit, tell,
        )  # fmt: skip
        self.wake = asyncio.Event()
        self.standby: Standby | None = None  # for the next copy
        self.copy: Copy | None = None
        self.requested = False  # a checkpoint is due
        self.owed: Copy | None = None  # has come to nothing, and the PVM may stand still for it
        self.resumed_s = 0.0  # when the PVM went on last
        self._again = False  # the copy for a checkpoint that is due has broken off once
        self._working: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """One copy after the other."""
        while True:
            await self.wake.wait()
            self.wake.clear()
            pvm = self._pvm()
            if pvm is None or self.standby is None or self.owed is not None:
                continue
            standby, self.standby = self.standby, None
            self.copy = Copy(standby, self.wake)
            self._working = asyncio.get_running_loop().create_task(self._make(self.copy, pvm))
            try:
                await asyncio.wait((self._working,))
            except asyncio.CancelledError:
                self._working.cancel()
                await asyncio.wait((self._working,))
                raise
            self.copy = self._working = None
            self.wake.set()

    def offered(self, standby: Standby) -> None:
        """The secondary has this one, and no other any more."""
        self.standby = standby
        if self.copy is not None and not self.copy.whole.done():
            self.copy.fail("the secondary has another standby")
        self.wake.set()

    def fail(self, reason: str) -> None:
        """The copy under way comes to nothing, if there is one."""
        if self.copy is not None:
            self.copy.fail(reason)
            self.wake.set()

    async def give_up(self, reason: str) -> None:
        """Likewise, and no checkpoint is due. Returns when the PVM goes on, or does not in time."""
        self.requested = False
        self.fail(reason)
        if self._working is not None:
            self.wake.set()
            await asyncio.wait((self._working,), timeout=2 * UNDO_S)

    async def settle_up(self, pvm: Pvm) -> None:
        """Another try to let the PVM go on, after that of _undo(), if it owes one."""
        if self.owed is None or self._working is not None:
            return
        try:
            async with asyncio.timeout(RELEASE_S):
                await self._release(self.owed, pvm)
        except (EngineError, TimeoutError) as e:
            say(logger, logging.WARNING, "the PVM may stand still", pair=self._pair, error=e)
            return
        self.owed = None
        self.wake.set()

    # ---- one of them -----------------------------------------------------------------------------------------------

    async def _make(self, copy: Copy, pvm: Pvm) -> None:
        try:
            await self._checkpoint(copy, pvm)
        except EngineError as e:
            requested, copy.filling = self.requested, None  # one that is asked for from here on gets the next copy
            await self._undo(copy, pvm, str(e))
            say(logger, logging.WARNING, "a copy came to nothing", pair=self._pair, reason=e)
            fatal = self._mirrors.broken or copy.refused
            # What breaks off before the secondary heard of it was no checkpoint yet: the next copy may do. Once.
            again = requested and not self._again and not copy.switching and self.owed is None
            self._again = again
            if (requested and not again) or copy.suspended or fatal:
                self.requested = False
                self._emit(Failed(fatal or str(e), fatal=bool(fatal)))
        except asyncio.CancelledError:
            await self._undo(copy, pvm, "given up")
            raise
        finally:
            if copy.relay is not None:
                copy.relay.close()

    async def _checkpoint(self, copy: Copy, pvm: Pvm) -> None:
        if (refused := await refusal(self._pair, pvm, self._mirrors)) is not None:
            copy.refused = refused
            raise EngineError(refused)
        copy.relay = relay = await copy.reach(self._pace)
        copy.filling = filling = Filling(pvm, relay, self._pace)
        await filling.begin()
        wanted = await self._unless_stopped(copy, self._fill(filling))
        # From the answer on client frames go to the standby, where they wait; the old SVM proves nothing more.
        copy.switching = True
        self._say_to("switch", copy.number, "")
        if wanted:
            await self._unless_stopped(copy, filling.prepare())
        await self._within(copy.switched, SWITCH_S, "the secondary has not switched to the standby")
        relay.widen()
        relay.open(0)
        await self._within(copy.stop, STOP_S, "the PVM did not come to a standstill")
        self._suspend(copy)
        await self._within(copy.moved, MOVE_S, "the PVM's rest was not moved")
        relay.let_go()
        if self._mirrors.nodes:
            copy.cutting = True
            self._say_to("cut", copy.number, "")
            await self._within(copy.cut, CUT_S, "the secondary has not closed the disks behind the PVM's last write")
        await pvm.cont()
        self.resumed_s = time.monotonic()
        await self._within(copy.whole, WHOLE_S, "the standby has not got the whole state")
        self.requested = self._again = False
        self._emit(Committed())
        self._say_to("go", copy.number, "")

    def _suspend(self, copy: Copy) -> None:
        """The PVM stands still, and did not since it was told: the old SVM's word ends here."""
        if copy.stood and not copy.suspended:
            copy.suspended = True
            self._emit(Suspended(requested=self.requested))

    async def _unless_stopped(self, copy: Copy, work: Coroutine[Any, Any, None]) -> bool:
        """False: the copy ends by itself meanwhile, and the PVM stands still already.

        From there on QEMU answers no command before its last bytes are written, so nobody may wait for an answer behind
        a gate that is shut. Raises EngineError if the work or the copy has failed.
        """
        task = asyncio.get_running_loop().create_task(work)
        try:
            await asyncio.wait((task, copy.stop), return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not task.done():
                task.cancel()
            [result] = await asyncio.gather(task, return_exceptions=True)
        if copy.stop.done():
            await copy.stop
            return False
        if result is not None:
            raise result
        return True

    async def _fill(self, filling: Filling) -> None:
        """Until a checkpoint is wanted, and its copy ready for it."""
        while not (self.requested and filling.ready):
            pause = await filling.look(self.requested)
            if not (self.requested and filling.ready):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self.wake.wait()
                self.wake.clear()

    async def _within(self, future: asyncio.Future[None], seconds: float, else_: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(future)
        except TimeoutError as e:
            raise EngineError(f"{else_} in {seconds:g} s") from e

    async def _undo(self, copy: Copy, pvm: Pvm, reason: str) -> None:
        """The PVM goes on without this copy, whatever has become of it; QEMU itself lets it if its migration breaks."""
        self._suspend(copy)  # the standby may be the SVM already, if the copy has ended by itself
        self._say_to("discard", copy.number, "")
        if copy.relay is not None:
            copy.relay.close()
        try:
            async with asyncio.timeout(UNDO_S):
                await self._release(copy, pvm)
        except (EngineError, TimeoutError) as e:
            say(logger, logging.WARNING, "the PVM's QEMU does not answer", pair=self._pair, error=e, after=reason)
            self.owed = copy
        if copy.cut_open:
            self._mirrors.broken = "a checkpoint broke off at the disks"

    async def _release(self, copy: Copy, pvm: Pvm) -> None:
        """Raises EngineError if it does not go on; to be tried again then.

        Its stream is broken, and QEMU notices. It is not told migrate_cancel: while it stops the guest for the
        migration's end it takes commands, and one that is cancelled then (seen with 7.2) closes the disks all the same
        and lets the guest go on without opening them: the guest's next write aborts QEMU.
        """
        while (await progress(pvm)).status in (*RUNNING, "cancelling"):
            await asyncio.sleep(0.01)
        if copy.cut_open:
            await self._mirrors.end(pvm)  # its next writes must not get into a layer that an SVM may already stand on
        self._suspend(copy)
        await pvm.go_on()
