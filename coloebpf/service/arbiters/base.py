"""What an arbiter is: it says which of two hosts that have lost each other goes on alone.

An arbiter answers yes (Grant) or no (Refusal). No answer is neither: whoever has none waits, and the programs see to it
that a host whose right to speak has run out meanwhile says nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from coloebpf.errors import ArbiterError
from coloebpf.model import Role
from coloebpf.service.log import say

log = logging.getLogger(__name__)

NS_PER_S = 1_000_000_000
RENEWALS = 3  # in the time that a lease has left: two may go wrong
RETRY_S = 0.1  # seconds between two tries when the arbiter gives no answer


class Protected(Protocol):
    """What an arbiter has to know of a pair; config.PairConfig has it."""

    @property
    def name(self) -> str: ...
    @property
    def role(self) -> Role: ...


@dataclass(frozen=True)
class Grant:
    """Yes. `deadline_ns`: CLOCK_MONOTONIC, to be renewed before; None: for good."""

    deadline_ns: int | None = None


@dataclass(frozen=True)
class Refusal:
    """No: this host is silent from now on."""

    reason: str


class Arbiter(Protocol):
    """One for all pairs of a host that name it."""

    @property
    def name(self) -> str: ...

    @property
    def promotes(self) -> bool:
        """A secondary may take over by its yes."""
        ...

    @property
    def leased(self) -> bool:
        """In lock-step the primary speaks by the secondary's leave only (peer/witness.py)."""
        ...

    async def check(self) -> None:
        """Would it answer? Raises ArbiterError with what an operator should know."""
        ...

    async def begin(self, pair: Protected) -> None:
        """On the primary, before it tells the secondary that they are in lock-step: from here on either may ask.

        Raises ArbiterError if that can't be recorded; then there is no lock-step.
        """
        ...

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        """May this host go on alone? Asks until there is an answer; the same question again gets the same answer."""
        ...

    async def renew(self, pair: Protected, seconds: int = 0) -> Grant | Refusal:
        """Moves the deadline of a grant, for `seconds` if that is longer than usual. Raises ArbiterError."""
        ...

    async def release(self, pair: Protected) -> Grant | Refusal:
        """The protection ends on purpose, and this host's guest goes on without any. Raises ArbiterError."""
        ...

    async def close(self) -> None: ...


async def keep(
    arbiter: Arbiter, pair: Protected, grant: Grant, clock: Callable[[], int], on_deadline: Callable[[int], None]
) -> Refusal:
    """Renews `grant` for as long as it can; returns when the arbiter says no.

    An arbiter that can't be reached is no reason to return: at the deadline the programs fall silent by themselves, and
    speak again if a later answer moves it.
    """
    deadline, told = grant.deadline_ns, False
    while deadline is not None:
        left_s = (deadline - clock()) / NS_PER_S
        await asyncio.sleep(max(left_s / RENEWALS, RETRY_S))
        try:
            answer = await arbiter.renew(pair)
        except ArbiterError as e:
            if not told:
                say(log, logging.WARNING, "the right to speak could not be renewed", pair=pair.name, error=e)
            told = True
            continue
        if isinstance(answer, Refusal):
            return answer
        if told:
            say(log, logging.INFO, "the right to speak is renewed again", pair=pair.name)
        told, deadline = False, answer.deadline_ns
        if deadline is not None:
            on_deadline(deadline)
    await asyncio.Event().wait()  # for good: there is nothing to renew
    raise AssertionError("unreachable")
