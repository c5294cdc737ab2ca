"""No arbiter: the secondary never takes over by itself, and a primary without its secondary goes on unprotected."""

from __future__ import annotations

import logging

from coloebpf.model import Role
from coloebpf.service.arbiters.base import Grant, Protected, Refusal
from coloebpf.service.log import say

log = logging.getLogger(__name__)


class NoArbiter:
    """Nobody can be sure that the other host is gone, so only the one that was speaking all the time may speak."""

    name, promotes, leased = "none", False, False

    def __init__(self) -> None:
        say(
            log,
            logging.WARNING,
            "pairs without an arbiter: if the primary is lost, nobody takes over until an operator says so; "
            "if the secondary is lost, the primary goes on unprotected",
        )

    async def check(self) -> None:
        return None

    async def begin(self, pair: Protected) -> None:
        return None

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        if pair.role is Role.PRIMARY:
            return Grant()
        return Refusal("there is no arbiter: the primary may be alive and speaking")

    async def renew(self, pair: Protected, seconds: int = 0) -> Grant | Refusal:
        return await self.acquire(pair)

    async def release(self, pair: Protected) -> Grant | Refusal:
        return Grant()

    async def close(self) -> None:
        return None
