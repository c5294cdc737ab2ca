"""The guest itself, on the host that runs it: looked for, and let go on when it stands still for no reason."""

from __future__ import annotations

import logging

from coloebpf.errors import XenError
from coloebpf.service.engine import DomainGone, Emit, Ready
from coloebpf.service.engines.xen_toolstack import Toolstack
from coloebpf.service.log import say

logger = logging.getLogger("coloebpf.xen")


class Pvm:
    """`domid`: its number, None while it is not there. `emit` is told when that changes."""

    def __init__(self, tools: Toolstack, emit: Emit) -> None:
        self._tools, self._emit = tools, emit
        self.domid: int | None = None
        self._complaint = ""

    async def look(self, may_stand: bool) -> None:
        """Tells Ready and DomainGone. `may_stand`: a copy is being made, so it may be suspended."""
        try:
            await self._look(may_stand)
            self._complaint = ""
        except XenError as e:
            if str(e) != self._complaint:
                say(logger, logging.ERROR, "nobody can look at the guest", pair=self._tools.pair, error=e)
            self._complaint = str(e)

    async def _look(self, may_stand: bool) -> None:
        guest = await self._tools.guest()
        if self.domid is not None and (guest is None or guest.ended or guest.domid != self.domid):
            self.domid = None
            self._emit(DomainGone(f"the guest {self._tools.domain} is gone"))
        if guest is None or guest.ended:
            return
        if guest.suspended and not may_stand:
            await self.let_go_on(guest.domid)  # what a copy of another service, or one that was killed, has left
        if self.domid is None:
            self.domid = guest.domid
            self._emit(Ready())

    async def lives(self) -> bool:
        """Raises XenError if nobody can say."""
        guest = await self._tools.guest()
        return guest is not None and not guest.ended

    async def let_go_on(self, domid: int) -> None:
        """Raises XenError."""
        say(logger, logging.WARNING, "the PVM stood still, and goes on", pair=self._tools.pair, domain=domid)
        await self._tools.do("resume", domid)
