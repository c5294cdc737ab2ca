"""Where the PVM's memory comes in: of the connections that anybody may begin, those with the standby's token."""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket

from coloebpf.errors import EngineError
from coloebpf.service.config import Address
from coloebpf.service.engines.qemu_replicas import TOKEN_BYTES, Replicas
from coloebpf.service.log import say
from coloebpf.service.tasks import Tasks

TOKEN_S = 2.0
RETRY_S = 1.0  # between two tries to take in a connection, after one that failed

logger = logging.getLogger("coloebpf.qemu")


class Incoming:
    """The port of a pair, from its making to close(). Raises EngineError if it can't listen."""

    def __init__(self, pair: str, listen: Address, replicas: Replicas, tasks: Tasks) -> None:
        self._pair, self._replicas, self._tasks = pair, replicas, tasks
        family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
        try:
            self._listener = socket.create_server((listen.host, listen.port), family=family)
        except OSError as e:
            raise EngineError(f"the engine can't listen at {listen}: {e.strerror}") from e
        self._listener.setblocking(False)

    def close(self) -> None:
        self._listener.close()

    async def run(self) -> None:
        """One connection after the other, until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(self._listener)
            except OSError as e:  # no descriptors are left, or whoever called has hung up
                say(logger, logging.WARNING, "no connection could be taken in", pair=self._pair, error=e)
                await asyncio.sleep(RETRY_S)
                continue
            self._tasks.spawn(self._take(connection))

    async def _take(self, connection: socket.socket) -> None:
        """Hands a connection that begins with the standby's token to the standby."""
        with connection:
            connection.setblocking(False)
            said = b""
            try:
                async with asyncio.timeout(TOKEN_S):
                    while len(said) < 2 * TOKEN_BYTES:
                        more = await asyncio.get_running_loop().sock_recv(connection, 2 * TOKEN_BYTES - len(said))
                        if not more:
                            return
                        said += more
            except (OSError, TimeoutError):
                return
            standby = self._replicas.standby
            if standby is None or standby.taken or not hmac.compare_digest(said, standby.token.encode()):
                say(logger, logging.WARNING, "a connection that is not the primary's", pair=self._pair)
                return
            standby.taken = True
            connection.setblocking(True)
            try:
                await standby.vm.qmp.give(connection.fileno(), "state")
                await standby.vm.qmp.do("migrate-incoming", uri="fd:state")
            except EngineError as e:
                self._replicas.lost(standby, str(e))
