"""Engine libxl-live on the secondary: the SVM runs, and libxl restores the PVM's next state into a domain beside it.

docs/xen.md has the order of a checkpoint, and what becomes of whom when somebody dies in the middle of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence

from coloebpf.control import PairState
from coloebpf.errors import EngineError, XenError
from coloebpf.model import State
from coloebpf.service.engine import DomainGone, Emit, EngineEvent, Ready, Replacing, Say
from coloebpf.service.engines.standby import Door
from coloebpf.service.engines.xen_domains import Domains, index_of
from coloebpf.service.engines.xen_places import Places, Ports
from coloebpf.service.engines.xen_primary import TEND_S, WANTED
from coloebpf.service.engines.xen_replicas import Replicas, Standby, Svm
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks
from coloebpf.vifs import SvmVifs

RETRY_S = 1.0  # between two tries to make a standby

logger = logging.getLogger("coloebpf.xen")


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
        index: Callable[[str], int] = index_of,
        lacks: Callable[[], str] = lambda: "",
    ) -> None:
        self._domains, self._emit_to, self._say_to, self._pair = domains, emit, tell, state
        self._lacks = lacks
        self._places = Places(nics, domains, vifs, ports, index)
        self._replicas = Replicas(domains, self._places, tell, lambda reason: self._emit(DomainGone(reason)))
        self._door = Door(domains.pair, domains.config.listen, self._token, self._take, domains.encryption)
        self._tasks = Tasks(self._failed)
        self._stopped = False
        self._before: int | None = None  # number of the standby that was there when the link came up, until asked
        self._settled: int | None = None  # number of the standby that has become the SVM last

    @property
    def svm(self) -> Svm | None:
        """The replica."""
        return self._replicas.svm

    @property
    def standby(self) -> Standby | None:
        """Where the next one comes in."""
        return self._replicas.standby

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Ready when libxl has answered. Raises EngineError if it can't listen, or there is no libxl."""
        await self._replicas.adopt(self._pair().state)
        self._door.open()
        self._tasks.spawn(self._tend())
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Raises EngineError: only the primary's can be asked."""
        raise EngineError("the primary makes the checkpoints")

    async def failover(self) -> None:
        """See Engine: the last copy, if it is whole, else the one that runs. Raises EngineError."""
        await self._replicas.promote()

    async def stop(self) -> None:
        """See Engine. The SVM goes on."""
        self._stopped = True
        await self._door.close()
        await self._tasks.end()
        await self._replicas.stop()
        await self._domains.end()

    # ---- coloebpf.service.engine.Talking ---------------------------------------------------------------------------

    def heard(self, word: str, number: int, detail: str) -> None:
        """See Talking."""
        standby = self.standby
        known = standby is not None and standby.number == number
        match word:
            case "ask":
                # It was another service's, or its copy has broken. One that the primary had not heard of when it asked
                # was taken since: the memory's connection may overtake the link.
                over = (number, self._before)
                self._before = None
                if standby is not None and standby.number in over and standby.taken and not standby.trial:
                    self._replicas.discard()
                self._replicas.offer()
            case "switch" if standby is not None and known:
                if not standby.trial:
                    self._try(standby)
            case "switch" if number != self._settled:
                self._say_to("lost", number, "there is no such standby")
            case "go":
                self._replicas.let_run()
            case "discard" if known:
                self._replicas.discard()

    def peer_up(self) -> None:
        """See Talking. The primary asks, and has given up what it had begun before."""
        self._before = self.standby.number if self.standby is not None else None

    # ---- a standby for each copy -----------------------------------------------------------------------------------

    async def _tend(self) -> None:
        while True:
            state = self._pair().state
            try:
                if self._domains.changes.due(state):
                    await self._replicas.look()
                if state is State.SYNCING:
                    self._replicas.mine = False  # whoever was the guest here: another protection begins
                if state is State.SYNCING and self.standby is None and (lacks := await asyncio.to_thread(self._lacks)):
                    self._say_to("unfit", 0, lacks)
                    raise EngineError(lacks)
                if state in WANTED and not self._replicas.mine and self.standby is None:
                    await self._replicas.begin_standby(alone=state is State.SYNCING)
                elif state is State.UNPROTECTED:
                    self._replicas.end()
            except EngineError as e:
                say(logger, logging.WARNING, "there is no standby", pair=self._domains.pair, error=e)
                self._domains.changes.again()
                await asyncio.sleep(RETRY_S)
            await self._domains.changes.wait(TEND_S)

    def _token(self) -> str | None:
        return self.standby.token if self.standby is not None and not self.standby.taken else None

    def _take(self, connection: socket.socket) -> None:
        standby = self.standby
        assert standby is not None
        standby.connection = connection
        standby.restoring = self._tasks.spawn(self._restore(standby, connection))

    async def _restore(self, standby: Standby, connection: socket.socket) -> None:
        domains, slot = self._domains, standby.slot
        with connection:
            try:
                # Without a limit: the primary has one from a copy's request on, and says when it was given up.
                domid = await standby.worker.do(
                    "restore", None, connection.fileno(),
                    name=domains.name(slot), uuid=domains.new_uuid(slot), bridges=domains.ports(slot),
                )  # fmt: skip
            except XenError as e:
                self._replicas.lost(standby, str(e))
                return
        if self.standby is standby:
            self._settle(standby, domid)

    def _try(self, standby: Standby) -> bool:
        """Client frames go to the standby's ports from here on, in the PVM's numbers; they wait there."""
        before = self._pair().epoch
        try:
            self._places.offer(standby.slot)
        except XenError as e:
            self._replicas.lost(standby, str(e))
            return False
        self._emit(Replacing())
        standby.trial = self._pair().epoch != before
        if not standby.trial:
            self._places.withdraw()
            self._replicas.lost(standby, "the secondary follows no primary")
        return standby.trial

    def _settle(self, standby: Standby, domid: int) -> None:
        """The copy is whole: there is no way back, and none is needed."""
        if standby.trial or self._try(standby):  # nobody has said so, or not in time
            self._places.settle()
            self._settled = standby.number
            self._replicas.replace(standby, domid)
            self._say_to("whole", standby.number, "")

    def _failed(self, error: BaseException) -> None:
        logger.error("a task of the engine has failed", exc_info=error)

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)
