"""Engine qemu on the primary: the PVM's memory goes by live migration into standbys on the other host, one by one.

The order of a checkpoint, and who does what: docs/qemu.md. The PVM is stopped by QEMU itself at the end of a migration,
so that it goes on by itself if that breaks, also when nobody is here to tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any

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
from coloebpf.service.engines.qemu_filling import MIB, RUNNING, Filling, progress
from coloebpf.service.engines.qemu_mirror import Mirrors, unreplicated
from coloebpf.service.engines.qemu_relay import Relay
from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.service.engines.qmp import Qmp
from coloebpf.service.log import say
from coloebpf.service.machine import REPLICATED

WANTED = (State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING)
TEND_S = 0.1
ASK_S = 1.0  # between two questions for a standby
CONNECT_S = 2.0
SWITCH_S = 1.0  # for the secondary: one write into a map
STOP_S = 2.0  # from the open gate to the PVM's standstill
MOVE_S = 2.0  # for the PVM's rest to leave QEMU; so long the PVM may stand still
WHOLE_S = 5.0  # for the standby to load it
CONT_S = 1.0  # for QEMU to be done with a migration that has completed
NOT_YET = "Migration is not finalized yet"  # QEMU's words for that
CUT_S = 1.0  # for the secondary: one command; the PVM stands still meanwhile
UNDO_S = 1.0
RELEASE_S = 5.0  # for each later try to let the PVM go on
STOPPED = ("paused", "postmigrate", "finish-migrate")  # what a checkpoint may leave behind

logger = logging.getLogger("coloebpf.qemu")


@dataclass(frozen=True)
class Standby:
    """What the secondary says of it. `token`: to be sent first, so that nobody else's memory gets in."""

    number: int
    host: str
    port: int
    token: str


class Copy:
    """One standby being filled, and what is heard of it."""

    def __init__(self, standby: Standby) -> None:
        loop = asyncio.get_running_loop()
        self.number = standby.number
        self.standby = standby
        self.relay: Relay | None = None
        self.filling: Filling | None = None
        self.refused = ""  # why no copy of this guest makes sense
        self.switching = False  # the secondary was told that the checkpoint comes
        self.cutting = False  # and to close the disks
        self.stood = False  # the PVM has come to a standstill for it
        self.suspended = False  # and that was told
        self.stop, self.moved, self.switched, self.cut, self.whole = (loop.create_future() for _ in range(5))
        self.futures: tuple[asyncio.Future[None], ...] = (self.stop, self.moved, self.switched, self.cut, self.whole)

    def fail(self, reason: str) -> None:
        """Whoever waits for something of it hears that it won't come."""
        for future in self.futures:
            if not future.done():
                future.set_exception(EngineError(reason))
                future.exception()  # nobody need look at it

    @property
    def cut_open(self) -> bool:
        """Nobody knows here whether the secondary has closed the disks."""
        return self.cutting and (not self.cut.done() or self.cut.exception() is not None)

    @staticmethod
    def came(future: asyncio.Future[None]) -> None:
        """It has happened."""
        if not future.done():
            future.set_result(None)


def _new_round() -> int:
    """None that another service may have used."""
    return 1 + secrets.randbelow(1 << 30)


class QemuPrimary:
    """See coloebpf.service.engine.Engine. `state`: the pair's, as the dataplane has it."""

    name = "qemu"
    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(self, vms: Vms, emit: Emit, tell: Say, state: Callable[[], State]) -> None:
        self._vms, self._emit_to, self._say_to, self._state = vms, emit, tell, state
        self._pace = vms.config.fill_mib_s * MIB
        self.pvm: Qmp | None = None
        self.resumed_s = 0.0  # when the PVM went on last
        self._mirrors = Mirrors(vms.config)
        self._standby: Standby | None = None
        self.copy: Copy | None = None
        self._requested = False  # a checkpoint is due
        self._again = False  # and the copy for it has broken off once
        self._asked = False  # a first one was asked for since the protection began
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._working: asyncio.Task[None] | None = None
        self._mirroring: asyncio.Task[None] | None = None
        self._stopped = False
        self._asked_s = 0.0
        self._owed: Copy | None = None  # has come to nothing, and the PVM may stand still for it
        self._heard = 0  # number of the last standby that was offered; 0: none was
        self._round = _new_round()  # of copying the disks: the number of all that is said about it

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready follows when the guest's QEMU answers, which may be started later."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._tend()), loop.create_task(self._work())]

    async def request_checkpoint(self) -> None:
        """See Engine."""
        if self.pvm is None:
            raise EngineError(f"the QEMU of {self._vms.name} does not answer")
        if self._requested:
            raise EngineError("a checkpoint is under way")
        # Later ones are not held up by it: each copy looks before it begins.
        if not self._asked and (refusal := await self._refusal(self.pvm)) is not None:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._emit, Failed(refusal, fatal=True))
            loop.call_soon(self._emit, Ready())  # for the next protection, when that is mended
            return
        self._requested = self._asked = True
        self._wake.set()

    async def failover(self) -> None:
        """Gives up the secondary; Ready follows, another SVM could be made."""
        self._requested = self._asked = False
        self._standby = None
        await self._give_up("the secondary is given up")
        if self.pvm is not None:
            await self._end_mirrors(self.pvm)
            asyncio.get_running_loop().call_soon(self._emit, Ready())

    async def stop(self) -> None:
        """See Engine. A PVM that stands still goes on."""
        self._stopped = True
        if self._mirroring is not None:
            self._tasks.append(self._mirroring)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.pvm is not None:
            await self.pvm.close()

    async def guest_lives(self) -> bool:
        """See Inquiring. One that hangs does: its monitor can be reached."""
        path = self._vms.monitor()
        try:
            async with asyncio.timeout(CONNECT_S):
                _, writer = await asyncio.open_unix_connection(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except TimeoutError:
            return True
        except OSError as e:
            raise EngineError(f"nobody can look at {path}: {e.strerror}") from e
        writer.close()
        return True

    @property
    def filled(self) -> bool:
        """A checkpoint that is asked for now need not wait for the copy of the memory."""
        return self.copy is not None and self.copy.filling is not None and self.copy.filling.ready

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        copy = self.copy if self.copy is not None and self.copy.number == number else None
        match word:
            case "standby":
                self._heard = number
                if copy is not None:
                    return  # offered twice
                host, port, token = detail.split()
                self._standby = Standby(number, host, int(port), token)
                if self.copy is not None and not self.copy.whole.done():
                    self.copy.fail("the secondary has another standby")
                self._wake.set()
            case "exported" if number == self._round and self._state() is State.SYNCING:
                host, port = detail.split()
                self._mirroring = asyncio.get_running_loop().create_task(self._mirror(host, int(port)))
            case "nodisks" if number == self._round and self._mirrors.due:
                self._round = _new_round()
                self._emit(Failed(detail, fatal=True))
                self._emit(Ready())
            case "cut" if copy:
                copy.came(copy.cut)
            case "switched" if copy:
                copy.came(copy.switched)
            case "whole" if copy:
                copy.came(copy.whole)
            case "lost" if copy:
                copy.fail(detail)
                self._wake.set()
            case "gone":
                self._emit(SecondaryGone(detail))

    def peer_up(self) -> None:
        """See Talking."""
        if self.copy is not None:
            self.copy.fail("the link was down meanwhile")
        self._standby = None
        self._asked_s = 0.0
        self._wake.set()

    # ---- the PVM ---------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            if self.pvm is None:
                with contextlib.suppress(EngineError):
                    await self._connect()
            if self._owed is not None and self._working is None and self.pvm is not None:
                await self._settle_up(self._owed, self.pvm)
            wanted = self._state() in WANTED
            if not wanted and self._asked:
                self._requested = self._asked = False
                await self._give_up("the protection has ended")
                if self.pvm is not None:
                    await self._end_mirrors(self.pvm)
                    self._emit(Ready())  # for the next protection: after a fatal failure nobody expects it
            now = asyncio.get_running_loop().time()
            if wanted and now - self._asked_s > ASK_S:
                self._asked_s = now
                await self._ask()
            await asyncio.sleep(TEND_S)

    async def _ask(self) -> None:
        """For what the secondary should have offered by now; each until it has."""
        if self._standby is None and self.copy is None:
            self._say_to("ask", self._heard, "")
        if self.pvm is not None and self._mirrors.due and self._asked:
            with contextlib.suppress(EngineError):
                self._say_to("disks", self._round, json.dumps(await self._mirrors.sizes(self.pvm)))

    async def _connect(self) -> None:
        monitor = self._vms.monitor()
        if not monitor.exists():
            return
        pvm = Qmp(f"the QEMU of {self._vms.name}", self._event, self._gone)
        await pvm.connect(monitor)
        try:
            followed = await self._take_up(pvm)
        except BaseException as e:
            await pvm.close()  # its monitor serves one client at a time: the next try
            if isinstance(e, TimeoutError):
                raise EngineError(f"{pvm.name} does not end the copies of its disks") from e
            raise
        self.pvm, self._owed = pvm, None
        self._emit(Ready())
        if self._state() in REPLICATED and not followed:
            self._emit(Failed("the guest's disks are not copied any more", fatal=True))

    async def _take_up(self, pvm: Qmp) -> bool:
        """Goes on where another service was. False: the disks are not copied any more.

        Raises EngineError, and TimeoutError if the copies of disks don't end.
        """
        # A service that was killed in the middle of a checkpoint may have left it so. An unprotected guest that stands
        # still does so by an operator's will.
        followed = await self._mirrors.adopt(pvm)
        if self._state() is not State.UNPROTECTED:
            if (await pvm.do("query-status"))["status"] in STOPPED and self._mirrors.nodes:
                await self._mirrors.end(pvm)  # nobody knows whether the secondary has closed the disks
                followed = False
            await self._go_on(pvm)
        return followed

    async def _mirror(self, host: str, port: int) -> None:
        if self.pvm is None or not self._mirrors.due:
            return
        try:
            await self._mirrors.begin(self.pvm, host, port)
        except EngineError as e:
            await self._end_mirrors(self.pvm)
            self._emit(Failed(str(e), fatal=True))
            self._emit(Ready())

    async def _end_mirrors(self, pvm: Qmp) -> None:
        self._round = _new_round()
        try:
            await self._mirrors.end(pvm)
        except (EngineError, TimeoutError) as e:
            say(logger, logging.ERROR, "the copies of the disks go on", pair=self._vms.name, error=e)

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        copy = self.copy
        if self._mirrors.event(name, data):
            self._wake.set()
            if self._mirrors.broken:
                self._emit(Failed(self._mirrors.broken, fatal=True))
        if copy is None:
            return
        if name == "STOP":
            copy.stood = True
            copy.came(copy.stop)
            self._wake.set()
        elif name == "MIGRATION" and data.get("status") == "completed":
            copy.came(copy.moved)
        elif name == "MIGRATION" and data.get("status") in ("failed", "cancelled"):
            copy.fail(f"the copy to the secondary has {data['status']}")
            self._wake.set()

    def _gone(self) -> None:
        pvm, self.pvm = self.pvm, None
        if pvm is not None:
            asyncio.get_running_loop().create_task(pvm.close())
        if self.copy is not None:
            self.copy.fail("the PVM's QEMU is gone")
            self._wake.set()
        self._vms.note_guest(None)
        self._emit(DomainGone(f"the QEMU of {self._vms.name} is gone"))

    async def _go_on(self, pvm: Qmp) -> None:
        if (await pvm.do("query-status"))["status"] in STOPPED:
            await self._cont(pvm)

    @staticmethod
    async def _cont(pvm: Qmp) -> None:
        """QEMU tells of a migration's end a moment before it takes this: seen once in some 20 on a busy machine."""
        end = time.monotonic() + CONT_S
        while True:
            try:
                await pvm.do("cont")
                return
            except EngineError as e:
                if NOT_YET not in str(e) or time.monotonic() > end:
                    raise
            await asyncio.sleep(0.001)

    async def _refusal(self, pvm: Qmp) -> str | None:
        """Why this guest can't be protected: a disk that it can write, and its SVM would have none like it."""
        if (disk := unreplicated(await pvm.do("query-block"), self._mirrors)) is None:
            return None
        return (
            f"{disk} of {self._vms.name} can be written and is not replicated: "
            "make it read-only, or keep the guest's data in its memory"
        )

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            if not self._asked or not self._mirrors.ready or self._owed is not None:
                continue
            if self.pvm is None or self._standby is None:
                continue
            standby, self._standby = self._standby, None
            self.copy = Copy(standby)
            self._working = asyncio.get_running_loop().create_task(self._make(self.copy, self.pvm))
            try:
                await asyncio.wait((self._working,))
            except asyncio.CancelledError:
                self._working.cancel()
                await asyncio.wait((self._working,))
                raise
            self.copy = self._working = None
            self._wake.set()

    async def _make(self, copy: Copy, pvm: Qmp) -> None:
        try:
            await self._checkpoint(copy, pvm)
        except EngineError as e:
            requested, copy.filling = self._requested, None  # one that is asked for from here on gets the next copy
            await self._undo(copy, pvm, str(e))
            say(logger, logging.WARNING, "a copy came to nothing", pair=self._vms.name, reason=e)
            fatal = self._mirrors.broken or copy.refused
            # What breaks off before the secondary heard of it was no checkpoint yet: the next copy may do. Once.
            again = requested and not self._again and not copy.switching and self._owed is None
            self._again = again
            if (requested and not again) or copy.suspended or fatal:
                self._requested = False
                self._emit(Failed(fatal or str(e), fatal=bool(fatal)))
        except asyncio.CancelledError:
            await self._undo(copy, pvm, "given up")
            raise
        finally:
            if copy.relay is not None:
                copy.relay.close()

    async def _checkpoint(self, copy: Copy, pvm: Qmp) -> None:
        if (refusal := await self._refusal(pvm)) is not None:
            copy.refused = refusal
            raise EngineError(refusal)
        copy.relay = relay = await self._reach(copy)
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
        await self._cont(pvm)
        self.resumed_s = time.monotonic()
        await self._within(copy.whole, WHOLE_S, "the standby has not got the whole state")
        self._requested = self._again = False
        self._emit(Committed())
        self._say_to("go", copy.number, "")

    def _suspend(self, copy: Copy) -> None:
        """The PVM stands still, and did not since it was told: the old SVM's word ends here."""
        if copy.stood and not copy.suspended:
            copy.suspended = True
            self._emit(Suspended(requested=self._requested))

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
        while not (self._requested and filling.ready):
            pause = await filling.look(self._requested)
            if not (self._requested and filling.ready):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await self._wake.wait()
                self._wake.clear()

    async def _reach(self, copy: Copy) -> Relay:
        """The way into the standby. Raises EngineError."""
        there = copy.standby
        try:
            async with asyncio.timeout(CONNECT_S):
                loop = asyncio.get_running_loop()
                family = socket.AF_INET6 if ":" in there.host else socket.AF_INET
                far = socket.socket(family, socket.SOCK_STREAM)
                far.setblocking(False)
                try:
                    await loop.sock_connect(far, (there.host, there.port))
                    await loop.sock_sendall(far, there.token.encode())
                except BaseException:
                    far.close()
                    raise
        except (OSError, TimeoutError) as e:
            raise EngineError(f"the standby at {there.host}:{there.port} can't be reached: {e or 'no answer'}") from e

        def end(reason: str) -> None:
            if reason:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(broken, reason)

        def broken(reason: str) -> None:
            if not copy.moved.done():
                copy.fail(reason)
                self._wake.set()

        return Relay(far, self._pace, end)

    async def _within(self, future: asyncio.Future[None], seconds: float, else_: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(future)
        except TimeoutError as e:
            raise EngineError(f"{else_} in {seconds:g} s") from e

    async def _undo(self, copy: Copy, pvm: Qmp, reason: str) -> None:
        """The PVM goes on without this copy, whatever has become of it; QEMU itself lets it if its migration breaks."""
        self._suspend(copy)  # the standby may be the SVM already, if the copy has ended by itself
        self._say_to("discard", copy.number, "")
        if copy.relay is not None:
            copy.relay.close()
        try:
            async with asyncio.timeout(UNDO_S):
                await self._release(copy, pvm)
        except (EngineError, TimeoutError) as e:
            say(logger, logging.WARNING, "the PVM's QEMU does not answer", pair=self._vms.name, error=e, after=reason)
            self._owed = copy
        if copy.cut_open:
            self._mirrors.broken = "a checkpoint broke off at the disks"

    async def _release(self, copy: Copy, pvm: Qmp) -> None:
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
        await self._go_on(pvm)

    async def _settle_up(self, copy: Copy, pvm: Qmp) -> None:
        """Another try, after that of _undo()."""
        try:
            async with asyncio.timeout(RELEASE_S):
                await self._release(copy, pvm)
        except (EngineError, TimeoutError) as e:
            say(logger, logging.WARNING, "the PVM may stand still", pair=self._vms.name, error=e)
            return
        self._owed = None
        self._wake.set()

    async def _give_up(self, reason: str) -> None:
        if self.copy is not None:
            self.copy.fail(reason)
        if self._working is not None:
            self._wake.set()
            await asyncio.wait((self._working,), timeout=2 * UNDO_S)

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)
