"""What a primary hands to its secondary when a protection begins: by which numbers clients know older connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from coloebpf.errors import PairError
from coloebpf.service.asking import Reply
from coloebpf.service.outside import PairAliases
from coloebpf.service.peer.messages import ALIASES_MAX, Aliases, Message

TAKE_S = 5.0  # for the secondary's answer: it takes a second at most out of its map, in turns, and writes some hundred


class Handing:
    """Of one pair. A part is sent when the last one was taken, so that the link never has more than that to carry."""

    def __init__(self, number: int, send: Callable[[Message], bool], aliases: PairAliases) -> None:
        self._number, self._send, self._aliases = number, send, aliases
        self._request = 0
        self._reply = Reply()

    async def run(self) -> int:
        """Returns how many there are when the secondary has all of them; raises PairError if it has not.

        From then on there can only be fewer. The secondary sees for itself where another connection begins on the same
        ports; but not, maybe, while it was about to take the entry: if one has gone meanwhile, it is told all anew.
        """
        texts = await self._texts()
        while True:
            for part, at in enumerate(range(0, max(1, len(texts)), ALIASES_MAX)):
                await self._hand(part, tuple(texts[at : at + ALIASES_MAX]))
            before, texts = len(texts), await self._texts()
            if len(texts) == before:
                return before

    async def _texts(self) -> list[str]:
        found: list[str] = []
        for some in self._aliases.texts():
            found += some
            await asyncio.sleep(0)
        return found

    async def _hand(self, part: int, entries: tuple[str, ...]) -> None:
        self._request += 1
        self._reply.expect(self._request)
        sent = self._send(Aliases(self._number, self._request, part, entries))
        if not sent or not await self._reply.within(TAKE_S):
            raise PairError("the secondary has not taken what it must know of the guest's connections")

    def taken(self, request: int) -> None:
        """The secondary has answered."""
        self._reply.came(request)
