"""The beginning and the end of a protection, as its primary sees them."""

from __future__ import annotations

import asyncio
import logging
from abc import abstractmethod
from collections.abc import Callable

from coloebpf.errors import ArbiterError, BpfError, PairError
from coloebpf.model import State
from coloebpf.service.arbiters.base import Grant, Refusal
from coloebpf.service.config import PairConfig
from coloebpf.service.engine import Emit, Engine
from coloebpf.service.handing import Handing
from coloebpf.service.machine import REPLICATED, Trigger
from coloebpf.service.outside import Outside
from coloebpf.service.parting import NO_REPLICA, Parting

RETRY_S = 0.5  # between two tries to begin a protection


class Protecting(Parting):
    """The part of a Primary between an operator's `protect` and the first checkpoint, and what ends a protection."""

    def __init__(self, config: PairConfig, make_engine: Callable[[Emit], Engine], outside: Outside) -> None:
        super().__init__(config, make_engine, outside)
        self._handing = Handing(self.number, outside.send, outside.aliases)
        self._beginning: asyncio.Task[None] | None = None

    @abstractmethod
    def look_again(self, after_ns: int) -> None:
        """Calls consider() then."""

    def aliases_taken(self, request: int) -> None:
        """See Parting."""
        self._handing.taken(request)

    def begin(self) -> None:
        """Both sides and the arbiter must be ready before there is a first checkpoint."""
        leased = self.out.arbiter.leased
        ready = self.engine_ready and self.peer_state is State.SYNCING
        if ready and (not leased or self._leave_ns > self.out.clock()) and self._beginning is None:
            self._beginning = self.spawn(self._record())
        elif self._beginning is None:
            self.look_again(int(RETRY_S * 1e9))

    async def _record(self) -> None:
        try:
            self.right.let_go()
            self._handed = True
            self.set_deadline(0)  # the secondary is no replica: nobody else can speak for the guest
            if number := await self._handing.run():
                self.say(logging.INFO, "the secondary knows the numbers of older connections", connections=number)
            await self.out.arbiter.begin(self.config)
            self._recorded = self._handed
        except (ArbiterError, BpfError, PairError) as e:
            self.say(logging.WARNING, "the protection can't begin yet", error=e)
            await asyncio.sleep(RETRY_S)
        finally:
            self._beginning = None
        self.consider()

    async def unprotect(self) -> None:
        """See Supervisor. Only when the secondary can't take over any more."""
        self.need(Trigger.UNPROTECT, "there is no protection to end")
        if self.machine.state is State.HALTED and not self.out.arbiter.leased and self.peer_state not in NO_REPLICA:
            hint = "" if self.peer_state is not None else ", and it can't be asked; if it is off, say `failover` here"
            raise PairError(f"pair {self.config.name}: the guest may run on the other host{hint}")
        sure = self.machine.state not in REPLICATED or await self.dismiss()
        if not sure:
            self._recorded = True  # the protection goes on, if this fails
        if not sure and self.out.arbiter.promotes and not self.out.arbiter.leased:
            raise PairError(f"pair {self.config.name}: the secondary does not answer, and might take over")
        try:
            answer = await self.out.arbiter.release(self.config)
        except ArbiterError as e:
            if not sure or self.machine.state is State.HALTED:
                raise PairError(f"pair {self.config.name}: {e}") from e
            answer = Grant()
        if isinstance(answer, Refusal):
            raise PairError(f"pair {self.config.name}: the guest may run on the other host: {answer.reason}")
        self._let_go_on("asked for by an operator")

    def _let_go_on(self, reason: str) -> None:
        """Without protection, and without an end."""

        def release() -> None:
            # What is held and not proven leaves in passthrough only, and would else wait for the next one.
            self.out.control.set_state(self.number, State.PASSTHROUGH)
            self.out.control.kick()
            self.out.control.set_state(self.number, State.UNPROTECTED)

        self.right.let_go()
        self.set_deadline(0)
        self.go(Trigger.UNPROTECT, reason, release)

    async def failover(self) -> None:
        """See Supervisor. While the secondary is lost it is an operator's word that its host is gone."""
        if self.machine.alone_pending:
            self.right.stop_asking()
            await self.take_over(Grant(), "an operator says that the secondary's host is gone")
            return
        if self.machine.state is State.HALTED and self.peer_state is None and not self.out.arbiter.leased:
            self._let_go_on("an operator says that the secondary's host is gone")
            return
        await self.handover()

    async def handover(self) -> None:
        """See Supervisor: this host falls silent and says so; that is all the certainty the secondary needs."""
        if self.machine.alone_pending or self.machine.state not in REPLICATED or self.peer_state not in REPLICATED:
            raise PairError(
                f"pair {self.config.name} is {self.machine.state.name.lower()}: there is no secondary that could take "
                "over; `unprotect` gives a protection up"
            )
        if self.engine.hands_over:
            raise PairError(f"pair {self.config.name}: engine {self.engine.name} can't: {self.engine.hands_over}")
        self.go(Trigger.LEASE_LOST, "an operator lets the secondary take over")
        if not self.told:
            raise PairError(
                f"pair {self.config.name}: this host is silent, but the secondary could not be told: it takes over "
                "when the link is back; if this can't wait, say `failover` there"
            )
