"""What an operator can order at the control socket, done by a pair's supervisor and answered with a sentence."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from coloebpf.errors import PairError, ServiceError
from coloebpf.model import Role, State
from coloebpf.service.machine import Change, Machine
from coloebpf.service.pair import Supervisor

COMMITS = 2  # that a command may have to wait for
BEGINNING = (State.SYNCING, State.CHECKPOINTING)  # until the first commit


class Orders:
    """control_socket.Commands."""

    def __init__(self, pairs: Callable[[], Iterable[Supervisor]]) -> None:
        self._pairs = pairs

    def longest_s(self, pair: str) -> float:
        """See Commands: a checkpoint may be under way already."""
        waits = (p.config.commit_timeout_ms / 1000 for p in self._pairs() if p.config.name == pair)
        return COMMITS * next(waits, 0.0)

    async def checkpoint(self, pair: str) -> str:
        """See Commands."""
        supervisor = self._named(pair)
        await supervisor.checkpoint()
        return f"pair {pair}: a checkpoint has committed, epoch {supervisor.note().epoch}"

    async def failover(self, pair: str) -> str:
        """See Commands."""
        supervisor = self._named(pair)
        await supervisor.failover()
        if supervisor.config.role is Role.PRIMARY and supervisor.machine.state is State.HALTED:
            return f"pair {pair}: this host is silent, so that the secondary takes over; look at it there"
        return f"pair {pair}: this host's guest is the one that speaks now"

    async def handover(self, pair: str) -> str:
        """See Commands."""
        await self._named(pair).handover()
        return f"pair {pair}: this host is silent, and the secondary's guest is the one that speaks"

    async def protect(self, pair: str) -> str:
        """See Commands."""
        supervisor = self._named(pair)
        waiting = _Until(supervisor.machine, lambda change: change.new not in BEGINNING)
        try:
            await supervisor.protect()
            change = await waiting.came
        finally:
            waiting.end()
        if change.new is not State.LOCKSTEP:
            raise PairError(f"pair {pair} is {change.new.name.lower()}: {supervisor.state_reason}")
        return f"pair {pair} is protected"

    async def unprotect(self, pair: str) -> str:
        """See Commands."""
        await self._named(pair).unprotect()
        return f"pair {pair} is unprotected; its guest goes on"

    def _named(self, name: str) -> Supervisor:
        pairs = {pair.config.name: pair for pair in self._pairs()}
        if name not in pairs:
            raise ServiceError(f"there is no pair {name!r}; there are: {', '.join(pairs) or 'none'}")
        return pairs[name]


class _Until:
    """The first change of a machine that is wanted. To be ended."""

    def __init__(self, machine: Machine, wanted: Callable[[Change], bool]) -> None:
        self.came: asyncio.Future[Change] = asyncio.get_running_loop().create_future()
        self._machine, self._wanted = machine, wanted
        machine.listeners.append(self._heard)

    def end(self) -> None:
        self._machine.listeners.remove(self._heard)

    def _heard(self, change: Change) -> None:
        if self._wanted(change) and not self.came.done():
            self.came.set_result(change)
