"""Engine qemu on the primary: the PVM's memory goes by live migration into standbys on the other host, one by one.

Here: what the pair and the other host's engine see of it, and the PVM's QEMU and disks from one service to the next.
Copies and checkpoints: qemu_checkpoints.py. The PVM is stopped by QEMU itself at the end of a migration, so that it
goes on by itself if that breaks, also when nobody is here to tell it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import DomainGone, Emit, EngineEvent, Failed, Ready, Say, SecondaryGone
from coloebpf.service.engines.qemu_checkpoints import Checkpoints
from coloebpf.service.engines.qemu_copy import Copy
from coloebpf.service.engines.qemu_filling import MIB
from coloebpf.service.engines.qemu_mirror import Mirrors, refusal
from coloebpf.service.engines.qemu_pvm import Pvm, lives
from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.service.engines.standby import Standby
from coloebpf.service.log import say
from coloebpf.service.machine import REPLICATED

WANTED = (State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING)
TEND_S = 0.1
ASK_S = 1.0  # between two questions for a standby

logger = logging.getLogger("coloebpf.qemu")


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
        self.pvm: Pvm | None = None
        self._mirrors = Mirrors(vms.config)
        pace = vms.config.fill_mib_s * MIB
        self._checkpoints = Checkpoints(vms.name, pace, self._mirrors, self._to_copy, self._emit, tell)
        self._asked = False  # a first checkpoint was asked for since the protection began
        self._tasks: list[asyncio.Task[None]] = []
        self._mirroring: asyncio.Task[None] | None = None
        self._stopped = False
        self._asked_s = 0.0
        self._heard = 0  # number of the last standby that was offered; 0: none was
        self._round = _new_round()  # of copying the disks: the number of all that is said about it

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready follows when the guest's QEMU answers, which may be started later."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._tend()), loop.create_task(self._checkpoints.run())]

    async def request_checkpoint(self) -> None:
        """See Engine."""
        if self.pvm is None:
            raise EngineError(f"the QEMU of {self._vms.name} does not answer")
        if self._checkpoints.requested:
            raise EngineError("a checkpoint is under way")
        # Later ones are not held up by it: each copy looks before it begins.
        if not self._asked and (refused := await refusal(self._vms.name, self.pvm, self._mirrors)) is not None:
            loop = asyncio.get_running_loop()
            loop.call_soon(self._emit, Failed(refused, fatal=True))
            loop.call_soon(self._emit, Ready())  # for the next protection, when that is mended
            return
        self._checkpoints.requested = self._asked = True
        self._checkpoints.wake.set()

    async def failover(self) -> None:
        """Gives up the secondary; Ready follows, another SVM could be made."""
        self._asked = False
        self._checkpoints.standby = None
        await self._checkpoints.give_up("the secondary is given up")
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
        """See Inquiring."""
        return await lives(self._vms.monitor())

    @property
    def copy(self) -> Copy | None:
        """The one under way."""
        return self._checkpoints.copy

    @property
    def filled(self) -> bool:
        """A checkpoint that is asked for now need not wait for the copy of the memory."""
        return self.copy is not None and self.copy.filling is not None and self.copy.filling.ready

    @property
    def resumed_s(self) -> float:
        """When the PVM went on last."""
        return self._checkpoints.resumed_s

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        copy = self.copy if self.copy is not None and self.copy.number == number else None
        match word:
            case "standby":
                self._heard = number
                if copy is not None:
                    return  # offered twice
                self._checkpoints.offered(Standby.of(number, detail, self._vms.encryption))
            case "exported" if number == self._round and self._state() is State.SYNCING:
                host, port = detail.split()
                self._mirroring = asyncio.get_running_loop().create_task(self._mirror(host, int(port)))
            case "nodisks" if number == self._round and self._mirrors.due:
                self._round = _new_round()
                self._emit(Failed(detail, fatal=True))
                self._emit(Ready())
            case "gone":
                self._emit(SecondaryGone(detail))
            case _ if copy is not None:
                copy.heard(word, detail)

    def peer_up(self) -> None:
        """See Talking."""
        self._checkpoints.fail("the link was down meanwhile")
        self._checkpoints.standby = None
        self._asked_s = 0.0

    # ---- the PVM ---------------------------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            if self.pvm is None:
                with contextlib.suppress(EngineError):
                    await self._connect()
            if self.pvm is not None:
                await self._checkpoints.settle_up(self.pvm)
            wanted = self._state() in WANTED
            if not wanted and self._asked:
                self._asked = False
                await self._checkpoints.give_up("the protection has ended")
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
        if self._checkpoints.standby is None and self.copy is None:
            self._say_to("ask", self._heard, "")
        if self.pvm is not None and self._mirrors.due and self._asked:
            with contextlib.suppress(EngineError):
                self._say_to("disks", self._round, json.dumps(await self._mirrors.sizes(self.pvm)))

    def _to_copy(self) -> Pvm | None:
        return self.pvm if self._asked and self._mirrors.ready else None

    async def _connect(self) -> None:
        monitor = self._vms.monitor()
        if not monitor.exists():
            return
        pvm = Pvm(f"the QEMU of {self._vms.name}", self._event, self._gone)
        await pvm.connect(monitor)
        try:
            followed = await self._take_up(pvm)
        except BaseException as e:
            await pvm.close()  # its monitor serves one client at a time: the next try
            if isinstance(e, TimeoutError):
                raise EngineError(f"{pvm.name} does not end the copies of its disks") from e
            raise
        self.pvm, self._checkpoints.owed = pvm, None
        self._emit(Ready())
        if self._state() in REPLICATED and not followed:
            self._emit(Failed("the guest's disks are not copied any more", fatal=True))

    async def _take_up(self, pvm: Pvm) -> bool:
        """Goes on where another service was. False: the disks are not copied any more.

        Raises EngineError, and TimeoutError if the copies of disks don't end.
        """
        # A service that was killed in the middle of a checkpoint may have left it so. An unprotected guest that stands
        # still does so by an operator's will.
        followed = await self._mirrors.adopt(pvm)
        if self._state() is not State.UNPROTECTED:
            if await pvm.stands_still() and self._mirrors.nodes:
                await self._mirrors.end(pvm)  # nobody knows whether the secondary has closed the disks
                followed = False
            await pvm.go_on()
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

    async def _end_mirrors(self, pvm: Pvm) -> None:
        self._round = _new_round()
        try:
            await self._mirrors.end(pvm)
        except (EngineError, TimeoutError) as e:
            say(logger, logging.ERROR, "the copies of the disks go on", pair=self._vms.name, error=e)

    def _event(self, name: str, data: Mapping[str, Any]) -> None:
        if self._mirrors.event(name, data):
            self._checkpoints.wake.set()
            if self._mirrors.broken:
                self._emit(Failed(self._mirrors.broken, fatal=True))
        if self.copy is not None:
            self.copy.event(name, data)

    def _gone(self) -> None:
        pvm, self.pvm = self.pvm, None
        if pvm is not None:
            asyncio.get_running_loop().create_task(pvm.close())
        self._checkpoints.fail("the PVM's QEMU is gone")
        self._vms.note_guest(None)
        self._emit(DomainGone(f"the QEMU of {self._vms.name} is gone"))

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)
