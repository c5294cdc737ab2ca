"""Engine libxl-live on the secondary: the SVM runs, and libxl restores the PVM's next state into a domain beside it.

docs/xen.md has the order of a checkpoint, and what becomes of whom when somebody dies in the middle of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from coloebpf.control import PairState
from coloebpf.errors import DeviceError, EngineError, XenError
from coloebpf.model import State
from coloebpf.service.engine import DomainGone, Emit, EngineEvent, Ready, Replacing, Say
from coloebpf.service.engines.standby import Door, new_token
from coloebpf.service.engines.xen_domains import SLOTS, Domains
from coloebpf.service.engines.xen_primary import TEND_S, WANTED
from coloebpf.service.log import say
from coloebpf.vifs import SvmVifs
from coloebpf.xen.client import END_S, Worker

GO_S = 1.0  # a new SVM that was not told to run runs after that: its primary has another service by now
RETRY_S = 1.0  # between two tries to make a standby
AGAIN_S = 0.1  # between two tries to let the SVM take over
STAYS = (State.LOCKSTEP, State.CHECKPOINTING, State.PROMOTED, State.HALTED)  # a copy that is here may be the guest

logger = logging.getLogger("coloebpf.xen")


class Ports(Protocol):
    """What coloebpf.xen.ports does. Both raise DeviceError."""

    def hold(self, vif: str) -> None: ...
    def release(self, vif: str) -> None: ...


class Standby:
    """A place for the next copy. `trial`: client frames go to it already."""

    def __init__(self, slot: int, number: int, worker: Worker) -> None:
        self.slot, self.number, self.worker = slot, number, worker
        self.token = new_token()
        self.connection: socket.socket | None = None
        self.restoring: asyncio.Task[None] | None = None
        self.trial = False

    @property
    def taken(self) -> bool:
        """A copy is coming in."""
        return self.connection is not None


class Svm:
    """The copy that is the replica. `paused`: it was not told to run yet."""

    def __init__(self, slot: int, domid: int, paused: bool) -> None:
        self.slot, self.domid, self.paused = slot, domid, paused


class XenSecondary:
    """See coloebpf.service.engine.Engine. `nics`: their numbers, in the order of their vifs; `state`: the pair's.

    `vifs`: which of its devices the SVM is behind; `ports`: what keeps frames for one that is not there yet.
    """

    name = "libxl-live"
    signals_suspended = True
    copies = True
    hands_over = ""

    def __init__(
        self,
        nics: Sequence[int],
        domains: Domains,
        vifs: SvmVifs,
        ports: Ports,
        emit: Emit,
        tell: Say,
        state: Callable[[], PairState],
        index: Callable[[str], int] = socket.if_nametoindex,
    ) -> None:
        self._nics, self._domains, self._vifs, self._ports = nics, domains, vifs, ports
        self._emit_to, self._say_to, self._pair, self._index = emit, tell, state, index
        self._config = domains.config
        self._door = Door(domains.pair, self._config.listen, self._token, self._take)
        self.svm: Svm | None = None
        self.standby: Standby | None = None
        self._leaving: set[asyncio.Task[None]] = set()  # copies that are being destroyed
        self._numbers = itertools.count(1 + secrets.randbelow(1 << 30))
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = False
        self._mine = False  # by a failover the SVM has become the guest
        self._before: int | None = None  # number of the standby that was there when the link came up, until asked
        self._settled: int | None = None  # number of the standby that has become the SVM last

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready when libxl has answered. Raises EngineError if it can't listen, or there is no libxl."""
        await self._adopt()
        self._door.open()
        self._spawn(self._tend())
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Raises EngineError: only the primary's can be asked."""
        raise EngineError("the primary makes the checkpoints")

    async def failover(self) -> None:
        """The SVM is the guest: the last copy, if it is whole, else the one that runs. Raises EngineError."""
        self._mine = True
        if self.standby is not None:
            self._discard()
        if self.svm is None:
            raise EngineError("there is no SVM")
        await self._insist(self.svm)
        try:
            await self._domains.take_name(self.svm.slot)
        except XenError as e:
            name = self._domains.name(self.svm.slot)
            say(logger, logging.ERROR, f"rename {name} by hand: xl rename", pair=self._domains.pair, error=e)

    async def _insist(self, svm: Svm) -> None:
        """Until it runs: nobody else has the guest. Raises EngineError if it is gone."""
        while True:
            try:
                await self._unpause(svm)
                return
            except XenError as e:
                if self.svm is not svm or not await self._lives(svm):
                    raise
                say(logger, logging.WARNING, "the SVM does not take over yet", pair=self._domains.pair, error=e)
            await asyncio.sleep(AGAIN_S)

    async def stop(self) -> None:
        """See Engine. The SVM goes on; a standby ends with its copy, for there may be no next service."""
        self._stopped = True
        await self._door.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.standby is not None:
            self._discard()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self._domains.end()

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
            case "switch" if known:
                self._switch()
            case "switch" if number != self._settled:
                self._say_to("lost", number, "there is no such standby")
            case "go" if self.svm is not None and self.svm.paused:
                self._run_svm()
            case "discard" if known:
                self._discard()

    def peer_up(self) -> None:
        """See Talking. The primary asks, and has given up what it had begun before."""
        self._before = self.standby.number if self.standby is not None else None

    # ---- domains ---------------------------------------------------------------------------------------------------

    async def _adopt(self) -> None:
        """What an earlier service has left: the SVM. Any other copy is half, or nobody knows what it has."""
        self._vifs.withdraw()
        here = self._vifs.here(self._nics[0])
        for slot in SLOTS:
            copy = await self._domains.copy(slot)
            vif = self._domains.vifs(slot)[0]
            if copy is not None and not copy.ended and self._index(vif) == here and self._pair().state in STAYS:
                self.svm = Svm(slot, copy.domid, paused=True)  # to run one that runs does no harm
            else:
                await self._domains.clear(slot)
        if self.svm is not None and self._pair().state is not State.HALTED:
            asyncio.get_running_loop().call_later(GO_S, self._run_svm)

    async def _tend(self) -> None:
        while True:
            state = self._pair().state
            pause = TEND_S
            try:
                if self.svm is not None and not await self._lives(self.svm):
                    self._svm_gone("the SVM is gone")
                if state is State.SYNCING:
                    self._mine = False  # whoever was the guest here: another protection begins
                if state in WANTED and not self._mine and self.standby is None:
                    await self._make_standby()
                elif state is State.UNPROTECTED:
                    self._end_all()
            except EngineError as e:
                say(logger, logging.WARNING, "there is no standby", pair=self._domains.pair, error=e)
                pause = RETRY_S
            await asyncio.sleep(pause)

    def _end_all(self) -> None:
        self._mine = False
        if self.standby is not None:
            self._discard()
        if self.svm is not None:
            svm, self.svm = self.svm, None
            self._leave(self._domains.clear(svm.slot))

    async def _lives(self, svm: Svm) -> bool:
        domains = {domain.domid: domain for domain in await self._domains.all()}
        return svm.domid in domains and not domains[svm.domid].ended

    async def _make_standby(self) -> None:
        if self._leaving:
            await asyncio.wait(self._leaving)
        svm = self.svm
        if svm is None:
            await self._end_old_guest()
        slot = next(slot for slot in SLOTS if svm is None or slot != svm.slot)
        await self._domains.clear(slot)
        worker = await self._domains.worker(f"restore{slot}")
        if self._mine or self.svm is not svm:  # something else has happened meanwhile
            await worker.end()
            return
        self.standby = Standby(slot, next(self._numbers), worker)
        self._offer()

    async def _end_old_guest(self) -> None:
        """This host was the guest's primary before. Its guest runs elsewhere now, and the protection begins anew."""
        if self._pair().state is State.SYNCING and (old := await self._domains.guest()) is not None:
            say(logger, logging.WARNING, "the guest's former domain is ended", pair=self._domains.pair)
            await self._domains.destroy(old.domid)

    def _offer(self) -> None:
        if self.standby is not None and not self.standby.taken:
            listen = self._config.listen
            self._say_to("standby", self.standby.number, f"{listen.host} {listen.port} {self.standby.token}")

    # ---- a copy comes in -------------------------------------------------------------------------------------------

    def _token(self) -> str | None:
        return self.standby.token if self.standby is not None and not self.standby.taken else None

    def _take(self, connection: socket.socket) -> None:
        standby = self.standby
        assert standby is not None
        standby.connection = connection
        standby.restoring = self._spawn(self._restore(standby, connection))

    async def _restore(self, standby: Standby, connection: socket.socket) -> None:
        domains, slot = self._domains, standby.slot
        with connection:
            try:
                domid = await standby.worker.do(
                    "restore", self._config.copy_timeout_s + self._config.step_timeout_s, connection.fileno(),
                    name=domains.name(slot), uuid=domains.new_uuid(slot), bridges=domains.ports(slot),
                )  # fmt: skip
            except XenError as e:
                self._lost(standby, str(e))
                return
        if self.standby is standby:
            self._settle(standby, domid)

    def _switch(self) -> None:
        """Client frames go to the standby's port from here on, in the PVM's numbers; they wait there."""
        standby = self.standby
        assert standby is not None
        if not standby.trial and not self._try(standby):
            self._lost(standby, "the secondary follows no primary")

    def _try(self, standby: Standby) -> bool:
        before = self._pair().epoch
        vifs = self._domains.vifs(standby.slot)
        try:
            for vif in vifs:
                self._ports.hold(vif)
        except DeviceError as e:  # what comes before its tap is there is lost: a frame lost on fwd is no worse
            say(logger, logging.ERROR, "frames for the next SVM are not kept", pair=self._domains.pair, error=e)
        self._vifs.offer({nic: self._index(vif) for nic, vif in zip(self._nics, vifs, strict=True)})
        self._emit(Replacing())
        standby.trial = self._pair().epoch != before
        if not standby.trial:
            self._vifs.withdraw()
        return standby.trial

    def _settle(self, standby: Standby, domid: int) -> None:
        """The copy is whole: there is no way back, and none is needed."""
        if not standby.trial and not self._try(standby):  # nobody has said so, or not in time
            self._lost(standby, "the secondary follows no primary")
            return
        self._vifs.settle()
        self._settled = standby.number
        old, self.svm, self.standby = self.svm, Svm(standby.slot, domid, paused=True), None
        self._leave(self._end_old(old, standby.worker))
        self._say_to("whole", standby.number, "")
        asyncio.get_running_loop().call_later(GO_S, self._run_svm)

    async def _end_old(self, old: Svm | None, worker: Worker) -> None:
        await worker.end()
        if old is not None:
            await self._domains.clear(old.slot)

    def _run_svm(self) -> None:
        """The primary has committed: what the SVM sends from here on counts."""
        if self.svm is not None and self.svm.paused and not self._stopped:
            self._spawn(self._run(self.svm))

    async def _run(self, svm: Svm) -> None:
        try:
            await self._unpause(svm)
        except XenError as e:
            if self.svm is svm:
                self._svm_gone(str(e))

    async def _unpause(self, svm: Svm) -> None:
        svm.paused = False
        await self._domains.do("unpause", svm.domid)
        for vif in self._domains.vifs(svm.slot):
            with contextlib.suppress(DeviceError):  # nothing was held, which was told
                self._ports.release(vif)

    def _discard(self) -> None:
        """The standby is of no use. What was switched to it goes back to the SVM that runs."""
        standby, self.standby = self.standby, None
        assert standby is not None
        if standby.trial:
            self._vifs.withdraw()
        self._leave(self._abandon(standby))

    async def _abandon(self, standby: Standby) -> None:
        if standby.connection is not None and standby.restoring is not None:
            with contextlib.suppress(OSError):
                standby.connection.shutdown(socket.SHUT_RDWR)  # libxl takes back what it has begun
            await asyncio.wait((standby.restoring,), timeout=END_S)
            standby.restoring.cancel()
            await asyncio.wait((standby.restoring,))
        await standby.worker.end()
        await self._domains.clear(standby.slot)

    def _lost(self, standby: Standby, reason: str) -> None:
        if self.standby is standby:
            self._discard()
            self._say_to("lost", standby.number, reason)

    def _svm_gone(self, reason: str) -> None:
        svm, self.svm = self.svm, None
        if svm is not None:
            self._leave(self._domains.clear(svm.slot))
        self._say_to("gone", 0, reason)
        self._emit(DomainGone(reason))

    def _leave(self, end: Coroutine[Any, Any, None]) -> None:
        """In the background: it takes seconds."""

        async def leave() -> None:
            try:
                await end
            except XenError as e:  # the next standby's clear() tries again
                say(logger, logging.WARNING, "a copy is not gone yet", pair=self._domains.pair, error=e)

        task = asyncio.get_running_loop().create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)
