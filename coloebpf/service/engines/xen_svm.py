"""The SVM that xl takes in, on the secondary: what libxl, or anybody, has done to it."""

from __future__ import annotations

import logging

from coloebpf.service.engines.xen_toolstack import Toolstack
from coloebpf.service.log import say
from coloebpf.xen.libxl import Domain

logger = logging.getLogger("coloebpf.xen")


class Svm:
    """`incoming`: its name while xl takes it in; then it has the guest's. All methods raise XenError."""

    def __init__(self, tools: Toolstack, incoming: str) -> None:
        self._tools, self._incoming = tools, incoming
        self._seen: tuple[int, str] | None = None  # number and UUID, which it keeps when libxl renames it

    @property
    def seen(self) -> bool:
        """It is there."""
        return self._seen is not None

    def forget(self) -> None:
        """Another one may come."""
        self._seen = None

    async def look(self) -> str:
        """Why it is no SVM any more; "" if it is, or was not there yet. Only while nobody lets it take over."""
        for domain in await self._tools.all():
            if self._seen is None and domain.name == self._incoming:
                self._seen = (domain.domid, domain.uuid)
            if self._seen == (domain.domid, domain.uuid):
                if domain.ended:
                    return "the SVM has crashed, or was shut down"
                renamed = domain.name == self._tools.domain
                return "libxl has made the SVM the guest, which nobody has asked for" if renamed else ""
        return "" if self._seen is None else "the SVM is gone"

    async def guest(self) -> Domain | None:
        """It, when it is the guest now: it runs, whatever its name, for libxl goes on when it can't rename it."""
        names = {domain.name: domain for domain in await self._living()}
        if (guest := names.get(self._tools.domain)) is not None:
            return guest
        guest = names.get(self._incoming)
        if guest is None or guest.paused or guest.suspended:
            return None
        do = f"xl rename {self._incoming} {self._tools.domain}"
        say(logger, logging.ERROR, "the guest runs without its own name", pair=self._tools.pair, do=do)
        return guest

    async def tell_fate(self) -> None:
        """What libxl has done to it by itself when the stream failed. The dataplane keeps it silent."""
        names = [domain.name for domain in await self._living()]
        if self._tools.domain in names:
            fate = "made it the guest: it runs, without a voice, until the next protection or xl destroy"
        elif self._incoming in names:
            fate = "left it: it ends with the next protection"
        else:
            fate = "destroyed it"
        say(logger, logging.ERROR, "what libxl has done to the SVM", pair=self._tools.pair, fate=fate)

    async def _living(self) -> list[Domain]:
        return [domain for domain in await self._tools.all() if not domain.ended]
