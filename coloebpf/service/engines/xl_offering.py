"""What the secondary offers to the primary: a standby, where it takes the guest in, and with which token."""

from __future__ import annotations

import itertools
import secrets
import socket
from collections.abc import Callable

from coloebpf.model import State
from coloebpf.service.engine import Say
from coloebpf.service.engines.standby import Door, new_token, offer
from coloebpf.service.engines.xen_primary import WANTED
from coloebpf.service.engines.xen_stream import Stream


class Offering:
    """`taken` gets the connection that came with the token; one standby is good for one connection."""

    def __init__(
        self, stream: Stream, say: Say, state: Callable[[], State], taken: Callable[[socket.socket], object]
    ) -> None:
        self._stream, self._say, self._state, self._taken = stream, say, state, taken
        self._door = Door(stream.pair, stream.listen, lambda: self._token, self._take, stream.encryption)
        self._token: str | None = None  # of the standby that is offered
        self._disk = ""
        self._number = 0
        self._numbers = itertools.count(1 + secrets.randbelow(1 << 30))

    def open(self) -> None:
        """Raises EngineError if it can't listen."""
        self._door.open()

    async def close(self) -> None:
        """Nobody comes in any more."""
        await self._door.close()

    @property
    def there(self) -> bool:
        """One is offered."""
        return self._token is not None

    def renew(self, disk: str) -> None:
        """Another one. `disk`: what the primary has to know of this host's (xl_disk.py), "" without one."""
        self._token, self._number, self._disk = new_token(), next(self._numbers), disk
        self.tell()

    def withdraw(self) -> None:
        """None is offered any more."""
        self._token = None

    def tell(self) -> None:
        """If one is offered."""
        if self._token is not None and self._state() in WANTED:
            if self._disk:
                self._say("disk", self._number, self._disk)
            self._say("standby", self._number, offer(self._stream.listen, self._token, self._stream.encryption))

    def _take(self, connection: socket.socket) -> None:
        self._token = None
        self._taken(connection)
