"""The guest itself, on the host that runs it: followed through names and reboots, let go on when it stands still."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Sequence

from coloebpf.errors import XenError
from coloebpf.service.engine import DomainGone, Emit, Ready, SecondaryGone
from coloebpf.service.engines.xen_toolstack import Toolstack
from coloebpf.service.log import say
from coloebpf.xen.libxl import Domain

logger = logging.getLogger("coloebpf.xen")


class Pvm:
    """`domid`, `name`: None and the configured one while it is not there. `macs`: of its NICs.

    `emit` is told Ready and DomainGone; and, when the guest reboots, SecondaryGone: the guest is not gone, but nothing
    that the SVM has goes on, so it must not take over.
    """

    def __init__(self, tools: Toolstack, emit: Emit, macs: Collection[str]) -> None:
        self._tools, self._emit = tools, emit
        self._macs = {mac.lower() for mac in macs}
        self.domid: int | None = None
        self.name = tools.domain
        self._uuid = ""  # of the last domain that was the guest: a reboot keeps it
        self.owed = False  # a libxl that may be killed first is to unpause it
        self._complaint = ""

    async def look(self, may_stand: Callable[[], bool]) -> None:
        """Tells what has become of it. `may_stand`: a copy is being made, so it may be suspended."""
        try:
            await self._look(may_stand)
            self._complaint = ""
        except XenError as e:
            self._tools.changes.again()
            if str(e) != self._complaint:
                say(logger, logging.ERROR, "nobody can look at the guest", pair=self._tools.pair, error=e)
            self._complaint = str(e)

    async def _look(self, may_stand: Callable[[], bool]) -> None:
        domains = await self._tools.all()
        self._tell_end(domains)
        guest = await self._find(domains)
        if guest is None:
            return
        if guest.suspended and not may_stand():
            await self.let_go_on(guest.domid)  # what a copy of another service, or one that was killed, has left
        if guest.name != self.name:
            self.name = guest.name
            say(logger, logging.WARNING, "the guest's name", pair=self._tools.pair, domain=guest.domid, name=self.name)
        if self.domid is None:
            self.domid, self._uuid = guest.domid, guest.uuid
            self._emit(Ready())

    def _tell_end(self, domains: Sequence[Domain]) -> None:
        if self.domid is None:
            return
        old = next(filter(self._is_it, domains), None)
        if old is not None and not old.ended:
            return
        self.domid, self.name = None, self._tools.domain
        if (old is not None and old.reboots) or any(one.uuid == self._uuid for one in self._living(domains)):
            self._emit(SecondaryGone(f"the guest {self._tools.domain} reboots, and the SVM is what it was before"))
        else:
            self._emit(DomainGone(f"the guest {self._tools.domain} is gone"))

    async def _find(self, domains: Sequence[Domain]) -> Domain | None:
        """By its UUID, its name; and by its NICs: it may have got another name while no service ran."""
        living = self._living(domains)
        for known in (
            lambda one: one.uuid == self._uuid,
            lambda one: one.name == self._tools.domain,
        ):
            if (found := next(filter(known, living), None)) is not None:
                return found
        domids = await self._tools.changes.domids(self._macs)
        found_there = [one for one in living if one.domid in domids]
        return found_there[0] if len(found_there) == 1 else None

    def _is_it(self, domain: Domain) -> bool:
        return (domain.domid, domain.uuid) == (self.domid, self._uuid)

    def _living(self, domains: Sequence[Domain]) -> list[Domain]:
        """Without copies, as our engines and libxl name them: one that was left has the guest's NICs, and its UUID."""
        copies = f"{self._tools.domain}--"
        return [one for one in domains if not one.ended and (self._is_it(one) or not one.name.startswith(copies))]

    async def lives(self) -> bool:
        """Raises XenError if nobody can say."""
        return await self._find(await self._tools.all()) is not None

    async def pause(self) -> None:
        """Unless it is paused, or is not there."""
        with contextlib.suppress(XenError):
            guest = await self._tools.numbered(self.domid) if self.domid is not None else None
            if guest is not None and not guest.paused:
                await self._tools.do("pause", guest.domid)

    async def run(self) -> None:
        """There is no libxl any more that would unpause it, if that was `owed`."""
        owed, self.owed = self.owed, False
        try:
            guest = await self._tools.numbered(self.domid) if owed and self.domid is not None else None
            if guest is not None and guest.paused:
                await self._tools.do("unpause", guest.domid)
                say(logger, logging.WARNING, "the PVM was paused, and runs", pair=self._tools.pair, domain=guest.domid)
        except XenError as e:
            do = f"xl unpause {self.name}"
            say(logger, logging.ERROR, "the PVM may be paused still", pair=self._tools.pair, error=e, do=do)

    async def let_go_on(self, domid: int) -> None:
        """Raises XenError."""
        say(logger, logging.WARNING, "the PVM stood still, and goes on", pair=self._tools.pair, domain=domid)
        await self._tools.do("resume", domid)
