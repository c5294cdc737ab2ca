"""The SVM on this host and the place for the next copy: made, adopted, run, and destroyed in the background."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import secrets
import socket
from collections.abc import Callable, Coroutine
from typing import Any

from coloebpf.errors import EngineError, XenError
from coloebpf.model import State
from coloebpf.service.engine import Say
from coloebpf.service.engines.standby import new_token, offer
from coloebpf.service.engines.xen_domains import SLOTS, Domains
from coloebpf.service.engines.xen_places import Places
from coloebpf.service.log import say
from coloebpf.xen.client import END_S, Worker

GO_S = 1.0  # a new SVM that was not told to run runs after that: its primary has another service by now
AGAIN_S = 0.1  # between two tries to let the SVM take over
STAYS = (State.LOCKSTEP, State.CHECKPOINTING, State.PROMOTED, State.HALTED)  # a copy that is here may be the guest

logger = logging.getLogger("coloebpf.xen")


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


class Replicas:
    """`gone`: told why there is no SVM any more."""

    def __init__(self, domains: Domains, places: Places, tell: Say, gone: Callable[[str], object]) -> None:
        self._domains, self._places, self._say_to, self._gone = domains, places, tell, gone
        self.svm: Svm | None = None
        self.standby: Standby | None = None
        self.mine = False  # by a failover the SVM has become the guest
        self._leaving: set[asyncio.Task[None]] = set()  # copies that are being destroyed, and orders under way
        self._numbers = itertools.count(1 + secrets.randbelow(1 << 30))
        self._stopped = False

    async def adopt(self, state: State) -> None:
        """What an earlier service has left: the SVM. Any other copy is half, or nobody knows what it has."""
        self._places.withdraw()
        for slot in SLOTS:
            copy = await self._domains.copy(slot)
            if copy is not None and not copy.ended and self._places.in_use(slot) and state in STAYS:
                self.svm = Svm(slot, copy.domid, paused=True)  # to run one that runs does no harm
            else:
                await self._domains.clear(slot)
        if self.svm is not None and state is not State.HALTED:
            self._expect_go()

    async def stop(self) -> None:
        """The SVM goes on; a standby ends with its copy, for there may be no next service."""
        self._stopped = True
        if self.standby is not None:
            self.discard()
        await asyncio.gather(*self._leaving, return_exceptions=True)

    # ---- the standby -----------------------------------------------------------------------------------------------

    async def begin_standby(self, alone: bool) -> None:
        """`alone`: the guest runs on the other host for certain. Raises XenError."""
        if self._leaving:
            await asyncio.wait(self._leaving)
        svm = self.svm
        if svm is None and alone:
            await self._end_old_guest()
        slot = next(slot for slot in SLOTS if svm is None or slot != svm.slot)
        await self._domains.clear(slot)
        await self._places.hold(slot)
        worker = await self._domains.worker(f"restore{slot}")
        if self.mine or self.svm is not svm:  # something else has happened meanwhile
            await worker.end()
            return
        self.standby = Standby(slot, next(self._numbers), worker)
        self.offer()

    async def _end_old_guest(self) -> None:
        """This host was the guest's primary before. Its guest runs elsewhere now, and the protection begins anew."""
        if (old := await self._domains.guest()) is not None:
            say(logger, logging.WARNING, "the guest's former domain is ended", pair=self._domains.pair)
            await self._domains.destroy(old.domid)

    def offer(self) -> None:
        """To the primary, again if it asks."""
        if self.standby is not None and not self.standby.taken:
            words = offer(self._domains.config.listen, self.standby.token, self._domains.encryption)
            self._say_to("standby", self.standby.number, words)

    def discard(self) -> None:
        """The standby is of no use. What was switched to it goes back to the SVM that runs."""
        standby, self.standby = self.standby, None
        assert standby is not None
        if standby.trial:
            self._places.withdraw()
        self._leave(self._abandon(standby))

    async def _abandon(self, standby: Standby) -> None:
        if standby.connection is not None and standby.restoring is not None:
            with contextlib.suppress(OSError):
                standby.connection.shutdown(socket.SHUT_RDWR)  # libxl takes back what it has begun
            await asyncio.wait((standby.restoring,), timeout=END_S)
            standby.restoring.cancel()
            await asyncio.wait((standby.restoring,))
        await standby.worker.end()
        await self._places.release(standby.slot)
        await self._domains.clear(standby.slot)

    def lost(self, standby: Standby, reason: str) -> None:
        """Its copy does not come to an end."""
        if self.standby is standby:
            self.discard()
            self._say_to("lost", standby.number, reason)

    def replace(self, standby: Standby, domid: int) -> None:
        """The standby is the SVM, the SVM that was is not needed any more."""
        old, self.svm, self.standby = self.svm, Svm(standby.slot, domid, paused=True), None
        self._leave(self._end_old(old, standby.worker))
        self._expect_go()

    async def _end_old(self, old: Svm | None, worker: Worker) -> None:
        await worker.end()
        if old is not None:
            await self._domains.clear(old.slot)

    # ---- the SVM ---------------------------------------------------------------------------------------------------

    def _expect_go(self) -> None:
        asyncio.get_running_loop().call_later(GO_S, self.let_run)

    def let_run(self) -> None:
        """The primary has committed: what the SVM sends from here on counts."""
        if self.svm is not None and self.svm.paused and not self._stopped:
            self._leave(self._run(self.svm))

    async def _run(self, svm: Svm) -> None:
        try:
            await self._unpause(svm)
        except XenError as e:
            if self.svm is svm:
                self._svm_gone(str(e))

    async def _unpause(self, svm: Svm) -> None:
        svm.paused = False
        await self._domains.do("unpause", svm.domid)
        await self._places.release(svm.slot)

    async def promote(self) -> None:
        """The SVM is the guest: the last copy, if it is whole, else the one that runs. Raises EngineError."""
        self.mine = True
        if self.standby is not None:
            self.discard()
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

    async def look(self) -> None:
        """Is it still there? Raises XenError if nobody can say."""
        svm = self.svm
        if svm is not None and not await self._lives(svm) and self.svm is svm:
            self._svm_gone("the SVM is gone")

    async def _lives(self, svm: Svm) -> bool:
        domains = {domain.domid: domain for domain in await self._domains.all()}
        return svm.domid in domains and not domains[svm.domid].ended

    def _svm_gone(self, reason: str) -> None:
        self._end_svm()
        self._say_to("gone", 0, reason)
        self._gone(reason)

    def end(self) -> None:
        """The protection has ended."""
        self.mine = False
        if self.standby is not None:
            self.discard()
        self._end_svm()

    def _end_svm(self) -> None:
        svm, self.svm = self.svm, None
        if svm is not None:
            self._leave(self._domains.clear(svm.slot))

    def _leave(self, work: Coroutine[Any, Any, None]) -> None:
        """In the background: it takes seconds."""

        async def leave() -> None:
            try:
                await work
            except XenError as e:  # the next standby's clear() tries again
                say(logger, logging.WARNING, "a copy is not gone yet", pair=self._domains.pair, error=e)

        task = asyncio.get_running_loop().create_task(leave())
        self._leaving.add(task)
        task.add_done_callback(self._leaving.discard)
