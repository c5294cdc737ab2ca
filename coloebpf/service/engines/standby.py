"""How a copy of the PVM reaches what waits for it: address and token by the link, memory by its own connection."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections.abc import Callable
from dataclasses import dataclass

from coloebpf.errors import EngineError
from coloebpf.service.config_keys import Address
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks

TOKEN_BYTES = 16  # random, of each standby; twice as many hexadecimal digits on the wire
TOKEN_S = 2.0
REACH_S = 2.0
RETRY_S = 1.0  # to take in a connection after one that failed
TLS = "tls"  # behind the token: what follows on the connection is encrypted

logger = logging.getLogger("coloebpf.engines")


def new_token() -> str:
    """So that nobody else's memory gets in: it goes over the services' TLS, and then comes first on the connection."""
    return secrets.token_hex(TOKEN_BYTES)


def offer(listen: Address, token: str, encryption: Encryption | None) -> str:
    """What the primary has to know (Standby.of)."""
    words = [listen.host, str(listen.port), token]
    return " ".join(words if encryption is None else [*words, TLS])


@dataclass(frozen=True)
class Standby:
    """What the secondary says of it."""

    number: int
    host: str
    port: int
    token: str
    tls: bool = False
    encryption: Encryption | None = None

    @classmethod
    def of(cls, number: int, said: str, encryption: Encryption | None) -> Standby:
        """As it was offered."""
        host, port, token, *more = said.split()
        return cls(number, host, int(port), token, TLS in more, encryption)

    async def reach(self) -> socket.socket:
        """A connection to it, not blocking. Raises EngineError."""
        if self.tls != (self.encryption is not None):
            raise EngineError(
                f"the other host wants the guest {'with' if self.tls else 'without'} TLS, this one does not: "
                "encrypt_copies in [peer] must be the same on both"
            )
        loop = asyncio.get_running_loop()
        far = socket.socket(_family(self.host), socket.SOCK_STREAM)
        far.setblocking(False)
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(REACH_S):
                await loop.sock_connect(far, (self.host, self.port))
                await loop.sock_sendall(far, self.token.encode())
        except BaseException as e:
            far.close()
            if isinstance(e, OSError | TimeoutError):
                raise EngineError(f"the standby at {self.host}:{self.port} can't be reached: {e or 'no answer'}") from e
            raise
        return far if self.encryption is None else await self.encryption.around(far, server=False)


class Door:
    """Takes in connections that begin with the token of what is waited for.

    `token`: returns it, None while nothing is; `taken` gets the connection, blocking and the callee's to close.
    """

    def __init__(
        self,
        pair: str,
        listen: Address,
        token: Callable[[], str | None],
        taken: Callable[[socket.socket], object],
        encryption: Encryption | None,
    ) -> None:
        self._pair, self._listen, self._token, self._taken = pair, listen, token, taken
        self._encryption = encryption
        self._listener: socket.socket | None = None
        self._tasks = Tasks(lambda error: logger.error("a task of the engine failed", exc_info=error))

    def open(self) -> None:
        """Raises EngineError if it can't listen."""
        try:
            self._listener = socket.create_server(
                (self._listen.host, self._listen.port), family=_family(self._listen.host)
            )
        except OSError as e:
            raise EngineError(f"the engine can't listen at {self._listen}: {e.strerror}") from e
        self._listener.setblocking(False)
        self._tasks.spawn(self._take_in(self._listener))

    async def close(self) -> None:
        """Nobody comes in any more."""
        await self._tasks.end()
        if self._listener is not None:
            self._listener.close()

    async def _take_in(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as e:  # no descriptors are left, or whoever called has hung up
                say(logger, logging.WARNING, "no connection could be taken in", pair=self._pair, error=e)
                await asyncio.sleep(RETRY_S)
                continue
            self._tasks.spawn(self._look(connection))

    async def _look(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        said = b""
        try:
            async with asyncio.timeout(TOKEN_S):
                while len(said) < 2 * TOKEN_BYTES:
                    more = await asyncio.get_running_loop().sock_recv(connection, 2 * TOKEN_BYTES - len(said))
                    if not more:
                        raise ConnectionError
                    said += more
        except (OSError, TimeoutError):
            connection.close()
            return
        except asyncio.CancelledError:
            connection.close()
            raise
        token = self._token()
        if token is None or not hmac.compare_digest(said, token.encode()):
            say(logger, logging.WARNING, "a connection that is not the primary's", pair=self._pair)
            connection.close()
            return
        if self._encryption is not None:
            try:
                connection = await self._encryption.around(connection, server=True)
            except EngineError as e:
                say(logger, logging.WARNING, "no connection could be taken in", pair=self._pair, error=e)
                return
            if self._token() != token:  # it was withdrawn meanwhile
                connection.close()
                return
        connection.setblocking(True)
        self._taken(connection)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
