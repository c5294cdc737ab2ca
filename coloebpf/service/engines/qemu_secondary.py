"""Engine qemu on the secondary: the SVM runs, and a standby takes in the PVM's next state beside it.

docs/qemu.md has the order of a checkpoint, and what becomes of whom when somebody dies in the middle of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import itertools
import json
import logging
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coloebpf.control import PairState
from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.engine import DomainGone, Emit, EngineEvent, Ready, Replacing, Say
from coloebpf.service.engines.qemu_disks import Disks
from coloebpf.service.engines.qemu_filling import CAPABILITIES
from coloebpf.service.engines.qemu_primary import TEND_S, WANTED
from coloebpf.service.engines.qemu_process import Process
from coloebpf.service.engines.qemu_vms import SLOTS, Vms
from coloebpf.service.engines.qmp import Qmp
from coloebpf.service.log import say
from coloebpf.service.machine import REPLICATED
from coloebpf.vifs import SvmVifs

TOKEN_BYTES = 16  # random, of each standby; twice as many hexadecimal digits on the wire
TOKEN_S = 2.0
GO_S = 1.0  # a new SVM that was not told to run runs after that: its primary has another service by now
RETRY_S = 1.0  # between two tries to start a standby, or to take in a connection after one that failed
AGAIN_S = 0.1  # between two tries to let the SVM take over

logger = logging.getLogger("coloebpf.qemu")


class Standby:
    """A QEMU that takes in a copy. `trial`: client frames go to it already; `loaded`: it has the PVM's memory.

    `cut`: its disks are closed behind the PVM's last write.
    """

    def __init__(self, vm: Process, number: int) -> None:
        self.vm, self.number = vm, number
        self.token = secrets.token_hex(TOKEN_BYTES)
        self.taken = self.trial = self.loaded = self.cut = False


class QemuSecondary:
    """See coloebpf.service.engine.Engine. `nics`: their numbers, in the order of their taps; `state`: the pair's.

    `vifs`: which of its devices the SVM is behind.
    """

    name = "qemu"
    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(
        self,
        nics: Sequence[int],
        vms: Vms,
        vifs: SvmVifs,
        emit: Emit,
        tell: Say,
        state: Callable[[], PairState],
        index: Callable[[str], int] = socket.if_nametoindex,
    ) -> None:
        vms.on_event, vms.on_gone = self._event, self._gone
        self._nics = nics
        self._vms, self._vifs, self._emit_to, self._say_to, self._pair, self._index = (
            vms, vifs, emit, tell, state, index,
        )  # fmt: skip
        self._disks = Disks(vms.name, vms.config)
        self.svm: Process | None = None
        self.standby: Standby | None = None
        self._paused = False  # the SVM was not told to run yet
        self._leaving: set[asyncio.Task[None]] = set()  # QEMUs that are being ended
        self._numbers = itertools.count(1 + secrets.randbelow(1 << 30))
        self._listener: socket.socket | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._stopped = False
        self._round = 0  # number of the disks' copies that were begun last; 0: none
        self._beginning: asyncio.Task[None] | None = None  # of those copies
        self._mine = False  # by a failover the SVM has become the guest
        self._before: int | None = None  # number of the standby that was there when the link came up, until asked
        self._settled: int | None = None  # number of the standby that has become the SVM last

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready at once. Raises EngineError if it can't listen."""
        listen = self._vms.config.listen
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        try:
            self._listener = socket.create_server((listen.host, listen.port), family=family)
        except OSError as e:
            raise EngineError(f"the engine can't listen at {listen}: {e.strerror}") from e
        self._listener.setblocking(False)
        await self._adopt()
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._tend()), loop.create_task(self._take_in())]
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Raises EngineError: only the primary's can be asked."""
        raise EngineError("the primary makes the checkpoints")

    async def failover(self) -> None:
        """The SVM is the guest: the standby, if it has the whole state, else the one that runs. Raises EngineError."""
        self._mine = True
        if self.standby is not None:
            self._discard()
        if self.svm is None:
            raise EngineError("there is no SVM")
        await self._insist(self.svm)
        self._paused = False
        self._vms.note_guest(self.svm.slot)
        self._round = 0
        await self._disks.end()

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

    async def stop(self) -> None:
        """See Engine. The SVM goes on; a standby ends with its copy, for there may be no next service."""
        self._stopped = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.standby is not None:
            self._discard()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        if self._listener is not None:
            self._listener.close()
        await self._disks.close()
        if self.svm is not None:
            await self.svm.qmp.close()

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        known = self.standby is not None and self.standby.number == number
        match word:
            case "ask":
                # It was another service's, or its copy has broken. One that the primary had not heard of when it asked
                # was taken since: the memory's connection may overtake the link.
                over = (number, self._before)
                self._before = None
                standby = self.standby
                if standby is not None and standby.number in over and standby.taken and not standby.trial:
                    self._discard()
                self._offer()
            case "disks":
                self._copy_disks(number, json.loads(detail))
            case "switch" if known:
                self._switch()
            case "cut" if self.standby is not None and known:
                self._spawn(self._cut(self.standby))
            case "switch" if number == self._settled:
                self._say_to("switched", number, "")  # the copy has ended by itself before anybody could say so
            case "switch":
                self._say_to("lost", number, "there is no such standby")
            case "go" if self._paused:
                self._run_svm()
            case "discard" if known:
                self._discard()

    def peer_up(self) -> None:
        """See Talking. The primary asks, and has given up what it had begun before."""
        self._before = self.standby.number if self.standby is not None else None

    # ---- QEMUs -----------------------------------------------------------------------------------------------------

    async def _adopt(self) -> None:
        """What an earlier service has left: the SVM. A standby has lost its copy with that service's end."""
        self._vifs.withdraw()
        here = self._vifs.here(self._nics[0])
        for slot in SLOTS:
            vm = await self._vms.adopt(str(slot))
            if vm is None:
                continue
            status = (await vm.qmp.do("query-status"))["status"]
            if self._index(self._vms.taps(slot)[0]) == here and status != "inmigrate":
                self.svm, self._paused = vm, status != "running"
            else:
                await self._vms.end(vm)
        if self._vms.config.disks and not await self._disks.adopt() and self._pair().state in REPLICATED:
            self._svm_gone("the SVM's disks are not followed any more")
        if self._paused:
            asyncio.get_running_loop().call_later(GO_S, self._run_svm)

    async def _tend(self) -> None:
        while True:
            state = self._pair().state
            pause = TEND_S
            if state is State.SYNCING:
                self._mine = False  # whoever was the guest here: another protection begins
            ready = self._disks.there or not self._vms.config.disks
            if state in WANTED and ready and not self._mine and self.standby is None:
                try:
                    await self._start_standby()
                except EngineError as e:
                    say(logger, logging.WARNING, "there is no standby", pair=self._vms.name, error=e)
                    pause = RETRY_S
            elif state is State.UNPROTECTED:
                self._mine = False
                if self.standby is not None:
                    self._discard()
                if self.svm is not None:
                    self._leave(self.svm)
                    self.svm = None
                self._round = 0
                await self._disks.end()
            await asyncio.sleep(pause)

    def _copy_disks(self, number: int, sizes: list[int]) -> None:
        """A protection begins. The primary says so until it has heard the answer, which may be lost."""
        if self._pair().state is not State.SYNCING:
            return
        if number == self._round and self._beginning is not None and not self._beginning.done():
            return
        if number == self._round and self._disks.there:
            self._tell_export(number)
            return
        if self._beginning is not None:
            self._beginning.cancel()
        self._round = number
        self._beginning = asyncio.get_running_loop().create_task(self._begin_disks(number, sizes, self._beginning))
        self._leaving_not(self._beginning)

    async def _begin_disks(self, number: int, sizes: list[int], before: asyncio.Task[None] | None) -> None:
        """Empty copies, which nobody reads from before they are whole."""
        if before is not None:
            await asyncio.wait((before,))
        if self.standby is not None:
            self._discard()
        if self.svm is not None:
            self._leave(self.svm)
            self.svm = None
        if self._leaving:
            await asyncio.wait(self._leaving)
        try:
            await self._disks.begin(sizes)
        except (EngineError, OSError) as e:
            say(logger, logging.ERROR, "there is no place for the guest's disks", pair=self._vms.name, error=e)
            self._say_to("nodisks", number, str(e))
            return
        self._tell_export(number)

    def _tell_export(self, number: int) -> None:
        listen = self._vms.config.disk_listen
        assert listen is not None
        self._say_to("exported", number, f"{listen.host} {listen.port}")

    async def _start_standby(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving)
        if self._mine:
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
        if self._mine:  # a failover came meanwhile
            await self._vms.end(vm)
            return
        self.standby = Standby(vm, next(self._numbers))
        self._offer()

    async def _end_old_guest(self) -> None:
        """This host was the guest's primary before. Its guest runs elsewhere now, and the protection begins anew."""
        old = Qmp("the guest's former QEMU", lambda name, data: None, lambda: None)
        with contextlib.suppress(EngineError):
            await old.connect(self._vms.config.qmp)
            say(logger, logging.WARNING, "the guest's former QEMU is ended", pair=self._vms.name)
            await old.do("quit")
        await old.close()

    def _offer(self) -> None:
        if self.standby is not None and not self.standby.taken:
            listen = self._vms.config.listen
            self._say_to("standby", self.standby.number, f"{listen.host} {listen.port} {self.standby.token}")

    async def _take_in(self) -> None:
        assert self._listener is not None
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as e:  # no descriptors are left, or whoever called has hung up
                say(logger, logging.WARNING, "no connection could be taken in", pair=self._vms.name, error=e)
                await asyncio.sleep(RETRY_S)
                continue
            task = loop.create_task(self._take(connection))
            self._leaving_not(task)

    def _leaving_not(self, task: asyncio.Task[None]) -> None:
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _take(self, connection: socket.socket) -> None:
        """Hands a connection that begins with the standby's token to the standby."""
        with connection:
            connection.setblocking(False)
            said = b""
            try:
                async with asyncio.timeout(TOKEN_S):
                    while len(said) < 2 * TOKEN_BYTES:
                        more = await asyncio.get_running_loop().sock_recv(connection, 2 * TOKEN_BYTES - len(said))
                        if not more:
                            return
                        said += more
            except (OSError, TimeoutError):
                return
            standby = self.standby
            if standby is None or standby.taken or not hmac.compare_digest(said, standby.token.encode()):
                say(logger, logging.WARNING, "a connection that is not the primary's", pair=self._vms.name)
                return
            standby.taken = True
            connection.setblocking(True)
            try:
                await standby.vm.qmp.give(connection.fileno(), "state")
                await standby.vm.qmp.do("migrate-incoming", uri="fd:state")
            except EngineError as e:
                self._lost(standby, str(e))

    # ---- checkpoints -----------------------------------------------------------------------------------------------

    def _switch(self) -> None:
        """Client frames go to the standby from here on, in the PVM's numbers; they wait in its tap."""
        standby = self.standby
        assert standby is not None
        if not standby.trial and not self._try(standby):
            self._lost(standby, "the secondary follows no primary")
            return
        self._say_to("switched", standby.number, "")

    def _try(self, standby: Standby) -> bool:
        before = self._pair().epoch
        taps = self._vms.taps(standby.vm.slot)
        self._vifs.offer({nic: self._index(tap) for nic, tap in zip(self._nics, taps, strict=True)})
        self._emit(Replacing())
        standby.trial = self._pair().epoch != before
        if not standby.trial:
            self._vifs.withdraw()
        return standby.trial

    def _event(self, vm: Process, name: str, data: Mapping[str, Any]) -> None:
        standby = self.standby
        if standby is None or standby.vm is not vm or name != "MIGRATION":
            return
        if data.get("status") == "failed":
            self._lost(standby, "the standby could not load the state")
        elif data.get("status") == "completed":
            if not standby.trial and not self._try(standby):  # it has ended before anybody could say so
                self._lost(standby, "the secondary follows no primary")
                return
            standby.loaded = True
            self._settle(standby)

    async def _cut(self, standby: Standby) -> None:
        """The PVM stands still, and does so until it hears of it: what it writes later is none of this copy's."""
        try:
            await self._disks.hold()
            await self._disks.cut()
        except EngineError as e:
            self._lost(standby, str(e))
            return
        standby.cut = True
        self._say_to("cut", standby.number, "")
        self._settle(standby)

    def _settle(self, standby: Standby) -> None:
        """Memory and disks are whole: there is no way back, and none is needed."""
        if self.standby is not standby or not standby.loaded or (self._vms.config.disks and not standby.cut):
            return
        self._vifs.settle()
        self._settled = standby.number
        old, self.svm, self.standby, self._paused = self.svm, standby.vm, None, True
        if old is not None:
            self._leave(old)
        if self._vms.config.disks:
            self._spawn(self._merge())
        self._say_to("whole", standby.number, "")
        asyncio.get_running_loop().call_later(GO_S, self._run_svm)

    async def _merge(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving)  # the old SVM reads what would be merged
        self._disks.settle()

    def _run_svm(self) -> None:
        """The primary has committed: what the SVM sends from here on counts."""
        if not self._paused or self.svm is None or self._stopped:
            return
        self._paused = False
        self._spawn(self._cont(self.svm))

    async def _cont(self, svm: Process) -> None:
        try:
            await svm.qmp.do("cont")
        except EngineError as e:
            self._svm_gone(str(e))

    def _discard(self) -> None:
        """The standby is of no use. What was switched to it goes back to the SVM that runs."""
        standby, self.standby = self.standby, None
        assert standby is not None
        if standby.trial:
            self._vifs.withdraw()
        self._leave(standby.vm)

    def _lost(self, standby: Standby, reason: str) -> None:
        if self.standby is standby:
            self._discard()
        self._say_to("lost", standby.number, reason)

    def _gone(self, vm: Process) -> None:
        if self.standby is not None and self.standby.vm is vm:
            self._lost(self.standby, "the standby's QEMU is gone")
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
        """Ends a QEMU, in the background."""
        task = asyncio.get_running_loop().create_task(self._vms.end(vm))
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _spawn(self, work: Any) -> None:
        self._leaving_not(asyncio.get_running_loop().create_task(work))

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)
