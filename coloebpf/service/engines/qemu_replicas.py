"""A secondary's virtual machines: the SVM that runs, and the standby beside it that may take its place.

Here they are made, found again by the next service, and ended. How a standby becomes the SVM: qemu_following.py.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import Callable

from coloebpf.control import PairState
from coloebpf.errors import EngineError
from coloebpf.service.engine import DomainGone, Emit, Say
from coloebpf.service.engines.qemu_disks import Disks
from coloebpf.service.engines.qemu_filling import CAPABILITIES
from coloebpf.service.engines.qemu_process import Process
from coloebpf.service.engines.qemu_taps import Taps
from coloebpf.service.engines.qemu_vms import SLOTS, Vms
from coloebpf.service.engines.qmp import Qmp
from coloebpf.service.engines.standby import new_token, offer
from coloebpf.service.log import say
from coloebpf.service.machine import REPLICATED
from coloebpf.service.tasks import Tasks

GO_S = 1.0  # a new SVM that was not told to run runs after that: its primary has another service by now
AGAIN_S = 0.1  # between two tries to let the SVM take over

logger = logging.getLogger("coloebpf.qemu")


class Standby:
    """A QEMU that takes in a copy. `trial`: client frames go to it already; `loaded`: it has the PVM's memory.

    `cut`: its disks are closed behind the PVM's last write.
    """

    def __init__(self, vm: Process, number: int) -> None:
        self.vm, self.number = vm, number
        self.token = new_token()
        self.taken = self.trial = self.loaded = self.cut = False


class Replicas:
    """Both of a pair. `state`: the pair's, as the dataplane has it; `stopped`: the service lets go of them."""

    def __init__(
        self, vms: Vms, disks: Disks, taps: Taps, emit: Emit, tell: Say, state: Callable[[], PairState], tasks: Tasks
    ) -> None:
        vms.on_gone = self._gone
        self._vms, self._disks, self._taps, self._emit, self._say_to, self._pair, self._tasks = (
            vms, disks, taps, emit, tell, state, tasks,
        )  # fmt: skip
        self.svm: Process | None = None
        self.paused = False  # the SVM was not told to run yet
        self.standby: Standby | None = None
        self.mine = False  # by a failover the SVM has become the guest
        self.stopped = False
        self._leaving: set[asyncio.Task[None]] = set()  # QEMUs that are being ended
        self._numbers = itertools.count(1 + secrets.randbelow(1 << 30))

    async def adopt(self) -> None:
        """What an earlier service has left: the SVM. A standby has lost its copy with that service's end."""
        self._taps.withdraw()
        for slot in SLOTS:
            vm = await self._vms.adopt(str(slot))
            if vm is None:
                continue
            status = (await vm.qmp.do("query-status"))["status"]
            if self._taps.in_use(slot) and status != "inmigrate":
                self.svm, self.paused = vm, status != "running"
            else:
                await self._vms.end(vm)
        if self._vms.config.disks and not await self._disks.adopt() and self._pair().state in REPLICATED:
            self._svm_gone("the SVM's disks are not followed any more")
        if self.paused:
            self.expect_go()

    async def stop(self) -> None:
        """The SVM goes on; a standby ends with its copy, for there may be no next service."""
        if self.standby is not None:
            self.discard()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self.svm is not None:
            await self.svm.qmp.close()

    # ---- the standby -----------------------------------------------------------------------------------------------

    async def begin_standby(self) -> None:
        """Raises EngineError."""
        await self.ended()
        if self.mine:
            return
        slot = next(slot for slot in SLOTS if self.svm is None or slot != self.svm.slot)
        self._vms.note_guest(None)
        if slot == 0 and self.svm is None and self._vms.config.qmp.exists():
            await self._end_old_guest()
        files = await self._disks.layer(slot) if self._vms.config.disks else []
        vm = await self._vms.boot(slot, files)
        try:
            late = {"capability": "late-block-activate", "state": True}  # they are opened when the SVM is to run
            await vm.qmp.do("migrate-set-capabilities", capabilities=[*CAPABILITIES, late])
            await vm.qmp.do("migrate-set-parameters", announce_rounds=0)
        except BaseException:
            await self._vms.end(vm)
            raise
        if self.mine:  # a failover came meanwhile
            await self._vms.end(vm)
            return
        self.standby = Standby(vm, next(self._numbers))
        self.offer()

    async def _end_old_guest(self) -> None:
        """This host was the guest's primary before. Its guest runs elsewhere now, and the protection begins anew."""
        old = Qmp("the guest's former QEMU", lambda name, data: None, lambda: None)
        with contextlib.suppress(EngineError):
            await old.connect(self._vms.config.qmp)
            say(logger, logging.WARNING, "the guest's former QEMU is ended", pair=self._vms.name)
            await old.do("quit")
        await old.close()

    def offer(self) -> None:
        """To the primary, unless it has begun to copy into it."""
        if self.standby is not None and not self.standby.taken:
            words = offer(self._vms.config.listen, self.standby.token, self._vms.encryption)
            self._say_to("standby", self.standby.number, words)

    def awaited(self) -> str | None:
        """The token of the connection that brings the standby's memory; None: no such one is waited for."""
        return self.standby.token if self.standby is not None and not self.standby.taken else None

    def take(self, connection: socket.socket) -> None:
        """The one that has said that token."""
        assert self.standby is not None
        self.standby.taken = True
        self._tasks.spawn(self._take(self.standby, connection))

    async def _take(self, standby: Standby, connection: socket.socket) -> None:
        try:
            with connection:
                await standby.vm.qmp.give(connection.fileno(), "state")
                await standby.vm.qmp.do("migrate-incoming", uri="fd:state")
        except EngineError as e:
            self.lost(standby, str(e))

    def discard(self) -> None:
        """The standby is of no use. What was switched to it goes back to the SVM that runs."""
        standby, self.standby = self.standby, None
        assert standby is not None
        if standby.trial:
            self._taps.withdraw()
        self._leave(standby.vm)

    def lost(self, standby: Standby, reason: str) -> None:
        """Nothing becomes of it."""
        if self.standby is standby:
            self.discard()
        self._say_to("lost", standby.number, reason)

    # ---- the SVM ---------------------------------------------------------------------------------------------------

    def replace(self, standby: Standby) -> None:
        """It is the SVM; the old one ends."""
        old, self.svm, self.standby, self.paused = self.svm, standby.vm, None, True
        if old is not None:
            self._leave(old)

    def expect_go(self) -> None:
        """Somebody is to call let_run() soon."""
        asyncio.get_running_loop().call_later(GO_S, self.let_run)

    def let_run(self) -> None:
        """The primary has committed: what the SVM sends from here on counts."""
        if not self.paused or self.svm is None or self.stopped:
            return
        self.paused = False
        self._tasks.spawn(self._cont(self.svm))

    async def _cont(self, svm: Process) -> None:
        try:
            await svm.qmp.do("cont")
        except EngineError as e:
            self._svm_gone(str(e))

    async def promote(self) -> None:
        """See Engine.failover()."""
        self.mine = True
        if self.standby is not None:
            self.discard()
        if self.svm is None:
            raise EngineError("there is no SVM")
        await self._insist(self.svm)
        self.paused = False
        self._vms.note_guest(self.svm.slot)

    async def _insist(self, svm: Process) -> None:
        """Until it runs: nobody else has the guest. Raises EngineError if it is gone."""
        while True:
            try:
                await svm.qmp.do("cont")
                return
            except EngineError as e:
                if svm.ended or self.svm is not svm:
                    raise
                say(logger, logging.WARNING, "the SVM does not take over yet", pair=self._vms.name, error=e)
            await asyncio.sleep(AGAIN_S)

    # ---- their end -------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Of both, in the background; ended() waits for it."""
        if self.standby is not None:
            self.discard()
        if self.svm is not None:
            self._leave(self.svm)
            self.svm = None

    async def ended(self) -> None:
        """Returns when QEMUs that were to end have ended."""
        if self._leaving:
            await asyncio.wait(self._leaving)

    def _gone(self, vm: Process) -> None:
        if self.standby is not None and self.standby.vm is vm:
            self.lost(self.standby, "the standby's QEMU is gone")
        elif self.svm is vm:
            self._svm_gone("the SVM's QEMU is gone")

    def _svm_gone(self, reason: str) -> None:
        if self.svm is not None:
            self._leave(self.svm)
        self.svm = None
        self._vms.note_guest(None)
        self._say_to("gone", 0, reason)
        self._emit(DomainGone(reason))

    def _leave(self, vm: Process) -> None:
        task = asyncio.get_running_loop().create_task(self._vms.end(vm))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
