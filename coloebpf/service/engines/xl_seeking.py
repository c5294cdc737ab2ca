"""The primary's search for a standby: the other host is asked for one, again and again, until it has offered it."""

from __future__ import annotations

import asyncio

from coloebpf.service.engine import Say
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.standby import Standby
from coloebpf.service.engines.xen_primary import ASK_S


class Seeking:
    """`found`: the standby that was offered, until it is taken or of no use any more."""

    def __init__(self, say: Say, encryption: Encryption | None) -> None:
        self._say, self._encryption = say, encryption
        self.found: Standby | None = None
        self._heard = 0  # number of the last one that was offered
        self._asked_s = 0.0

    def ask(self) -> None:
        """Not too often."""
        now = asyncio.get_running_loop().time()
        if now - self._asked_s > ASK_S:
            self._asked_s = now
            self._say("ask", self._heard, "")

    def offered(self, number: int, detail: str) -> None:
        """By the other host."""
        self._heard = number
        self.found = Standby.of(number, detail, self._encryption)

    def take(self) -> Standby:
        """There is one; it is good for one stream."""
        assert self.found is not None
        found, self.found = self.found, None
        return found

    def peer_up(self) -> None:
        """The other host's service is another one, perhaps."""
        self.found = None
        self._asked_s = 0.0
