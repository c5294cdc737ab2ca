"""What a primary hands to its secondary when a protection begins: by which numbers clients know older connections."""

from __future__ import annotations

from collections.abc import Callable

from coloebpf.errors import PairError
from coloebpf.service.asking import Reply
from coloebpf.service.outside import PairAliases
from coloebpf.service.peer.messages import ALIASES_MAX, Aliases, Message

TAKE_S = 1.0  # for the secondary's answer: some hundred writes into a map


class Handing:
    """Of one pair. A part is sent when the last one was taken, so that the link never has more than that to carry."""

    def __init__(self, number: int, send: Callable[[Message], bool], aliases: PairAliases) -> None:
        self._number, self._send, self._aliases = number, send, aliases
        self._request = 0
        self._reply = Reply()

    async def run(self) -> int:
        """Returns how many there are when the secondary has all of them; raises PairError if it has not.

        From then on there will be fewer: what ends, or begins anew on the same ports, both hosts see for themselves.
        """
        texts = self._aliases.texts()
        for part, at in enumerate(range(0, max(1, len(texts)), ALIASES_MAX)):
            self._request += 1
            self._reply.expect(self._request)
            entries = tuple(texts[at : at + ALIASES_MAX])
            sent = self._send(Aliases(self._number, self._request, part, entries))
            if not sent or not await self._reply.within(TAKE_S):
                raise PairError("the secondary has not taken what it must know of the guest's connections")
        return len(texts)

    def taken(self, request: int) -> None:
        """The secondary has answered."""
        self._reply.came(request)
