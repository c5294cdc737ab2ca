"""A pair's right to go on alone on this host: asked of the arbiter, kept for as long as it lets it, and given up."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from coloebpf.errors import ArbiterError
from coloebpf.service.arbiters.base import Grant, Refusal, keep
from coloebpf.service.machine import Trigger

if TYPE_CHECKING:
    from coloebpf.service.pair import Supervisor


class Right:
    """`pair` is told what the arbiter says."""

    def __init__(self, pair: Supervisor) -> None:
        self._pair, self._arbiter = pair, pair.out.arbiter
        self._asking: asyncio.Task[None] | None = None
        self._unanswered = False  # the arbiter has not said anything yet
        self._keeping: asyncio.Task[None] | None = None

    @property
    def asked(self) -> bool:
        """The arbiter was, and what it says is not done yet."""
        return self._asking is not None

    def ask(self) -> None:
        """Asks the arbiter, once."""
        if self._asking is None:
            self._asking = self._pair.spawn(self._ask())

    async def _ask(self) -> None:
        pair, name = self._pair, self._arbiter.name
        pair.say(logging.WARNING, "asking the arbiter for the right to go on alone", arbiter=name)
        try:
            self._unanswered = True
            try:
                answer = await self._arbiter.acquire(pair.config)
            finally:
                self._unanswered = False
            if isinstance(answer, Grant):
                await pair.take_over(answer, f"arbiter {name} says yes")
            else:
                pair.go(Trigger.REFUSED, answer.reason)
        finally:
            if self._asking is asyncio.current_task():
                self._asking = None

    def stop_asking(self) -> None:
        """An operator knows better, or nobody waits for the answer any more."""
        if self._asking is not None:
            self._asking.cancel()
            self._asking, self._unanswered = None, False

    def not_wanted(self) -> None:
        """Stops asking, unless there is an answer already: it could only do harm, and turn off a host that is well."""
        if self._unanswered:
            self.stop_asking()

    def hold(self, grant: Grant) -> None:
        """Keeps what was granted for as long as the arbiter lets it."""
        self.let_go()
        if grant.deadline_ns is not None:
            self._keeping = self._pair.spawn(self._keep(grant))

    def let_go(self) -> None:
        """No more renewals."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None

    async def _keep(self, grant: Grant) -> None:
        pair = self._pair
        refusal = await keep(self._arbiter, pair.config, grant, pair.out.clock, pair.set_deadline)
        self._keeping = None
        pair.go(Trigger.LEASE_LOST, refusal.reason)

    async def rest(self, seconds: int) -> None:
        """See Supervisor."""
        if self._keeping is None:
            return
        self.let_go()
        try:
            answer = await self._arbiter.renew(self._pair.config, seconds)
        except ArbiterError as e:
            self._pair.say(logging.WARNING, "the right to speak could not be made to last for a restart", error=e)
            return
        if isinstance(answer, Grant) and answer.deadline_ns is not None:
            self._pair.set_deadline(answer.deadline_ns)

    def take_up(self) -> None:
        """After a restart: the right that this host had may still be its own."""
        if self._arbiter.leased:
            self._keeping = self._pair.spawn(self._take_up())

    async def _take_up(self) -> None:
        answer = await self._arbiter.acquire(self._pair.config)
        if isinstance(answer, Refusal):
            self._keeping = None
            self._pair.go(Trigger.LEASE_LOST, answer.reason)
        elif answer.deadline_ns is not None:
            self._pair.set_deadline(answer.deadline_ns)
            await self._keep(answer)
