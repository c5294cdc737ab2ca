"""A primary's leave to speak, pair by pair: until when it has it, as the secondary's grants say (witness.py)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from coloebpf.service.peer.messages import Settled
from coloebpf.service.peer.witness import Speaker


class Leaves:
    """Of the pairs that need one. `tell(pair, deadline_ns)`: the primary may speak until then; `send`: the link's."""

    def __init__(self, speaker: Speaker, tell: Callable[[int, int], None], send: Callable[[Settled], bool]) -> None:
        self._speaker, self._tell, self._send = speaker, tell, send
        self._deadlines: dict[int, int | None] = {}  # pair -> the last that was told
        self._unsettled: set[int] = set()  # of these, whose deadline may be by a grant of before this session

    def need(self, pairs: Collection[int], before: Collection[int]) -> None:
        """From here on just these; `before`: pairs of which grants of this session were heard, if there were any."""
        self._deadlines = {pair: self._deadlines.get(pair) for pair in pairs}
        self._unsettled = {pair for pair in pairs if pair in self._unsettled or pair not in before}

    def begin_session(self) -> None:
        """With another service of the secondary's: what it knows of is granted from here on."""
        self._unsettled = set(self._deadlines)

    def end_session(self) -> None:
        """Nothing is taken back any more: a `settled` would make the secondary forget what it is about to grant."""
        self._unsettled.clear()

    def deadline_ns(self, pair: int) -> int | None:
        """None: it needs none, or has heard of none yet."""
        return self._deadlines.get(pair)

    def granted(self, pair: int, echo: int) -> None:
        """As the answer to our beat `echo`."""
        deadline = self._speaker.deadline_ns(echo)
        if pair not in self._deadlines or deadline is None:
            return
        unsettled = pair in self._unsettled
        if unsettled or deadline > (self._deadlines[pair] or 0):  # two paths bring each grant twice
            self._deadlines[pair] = deadline
            self._tell(pair, deadline)
        if unsettled and self._send(Settled(pair)):
            self._unsettled.discard(pair)

    def granted_longer(self, pairs: Iterable[int], deadline_ns: int) -> None:
        """For a planned restart of either side."""
        for pair in pairs:
            if pair in self._deadlines and deadline_ns > (self._deadlines[pair] or 0):
                self._unsettled.discard(pair)
                self._deadlines[pair] = deadline_ns
                self._tell(pair, deadline_ns)
