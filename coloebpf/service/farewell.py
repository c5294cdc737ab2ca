"""A planned restart of a host's service: both hosts agree beforehand on how long its silence means nothing.

Without that each restart would be a takeover, for a service that is silent for longer than `heartbeat_timeout_ms` is
as good as a host that is gone. So a service that ends says `restarting`, and the other side `patience`:

- While the primary's service is away the secondary does not ask the arbiter, and its last grant holds for so long
  (peer/witness.py): the primary's programs go on comparing and releasing, and nobody else may speak.
- While the secondary's is away the primary goes on in the same way, by the grant that `restarting` carries.
- Nobody asks for checkpoints meanwhile; what differs waits.
- A host that dies meanwhile is found when the time is over. A service that is back ends it at once: with its hello the
  beats count again, and `settled` takes back what was granted for longer than a beat's lease.

The shorter time of both hosts' `restart_grace_ms` counts. If nobody answers, the host that goes has no more than its
lease, so that the restart is a takeover, as a crash is.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from coloebpf.service.heartbeat import Heartbeat
from coloebpf.service.log import say
from coloebpf.service.peer.messages import Message, Patience, Restarting, Settled

log = logging.getLogger(__name__)

MS = 1_000_000  # ns
ANSWER_S = 0.5  # for the other side's word: a message there and back


class Farewell:
    """Of one host. `grace_ms`: what it asks for, and gives at most."""

    def __init__(
        self, heartbeat: Heartbeat, send: Callable[[Message], bool], grace_ms: int, clock: Callable[[], int]
    ) -> None:
        self._heartbeat, self._send, self._grace_ms, self._clock = heartbeat, send, grace_ms, clock
        self._asked_ns = self._ms = 0
        self._answered = asyncio.Event()

    async def say(self) -> None:
        """To be called when the service ends, before anything else of it does. Returns when that may go on."""
        if not self.ask():
            return
        try:
            async with asyncio.timeout(ANSWER_S):
                await self._answered.wait()
            say(log, logging.INFO, "the other host waits for this one's next service", ms=self._ms)
        except TimeoutError:
            say(log, logging.WARNING, "the other host does not say that it waits for this one's next service")

    def ask(self) -> bool:
        """False if there is nobody to be asked."""
        self._asked_ns = self._clock()
        if not self._grace_ms:
            return False
        self._heartbeat.leaves.end_session()
        echo, granted = self._heartbeat.promises()
        self._promise(granted, self._grace_ms * MS)
        return self._send(Restarting(self._grace_ms, echo, granted))

    def received(self, message: Restarting | Patience | Settled) -> None:
        """What the other side says of it."""
        match message:
            case Restarting():
                ms = min(message.ms, self._grace_ms)
                say(log, logging.WARNING, "the other host's service restarts", patience_ms=ms)
                self._send(Patience(ms, self._bear(ms * MS, message.echo, message.granted)))
            case Patience():
                if self._asked_ns and not self._answered.is_set():
                    self._ms = min(message.ms, self._grace_ms)
                    self._heartbeat.leaves.granted_longer(message.granted, self._asked_ns + self._ms * MS)
                    self._answered.set()
            case Settled() if not self._asked_ns:  # else it was sent before the other side knew of the longer grant
                self._heartbeat.granter.settle(message.pair)

    def _bear(self, length_ns: int, echo: int, granted: Iterable[int]) -> tuple[int, ...]:
        """The peer's service will be silent for so long. Returns the pairs that it may speak for meanwhile.

        It lets us speak for the pairs `granted`, from the sending of our beat `echo` on.
        """
        beats = self._heartbeat
        beats.bear_until_ns = self._clock() + length_ns
        promised = beats.granted
        self._promise(promised, length_ns)
        sent = beats.speaker.sent_at_ns(echo)
        if sent is not None:
            beats.leaves.granted_longer(granted, sent + length_ns)
        return promised

    def _promise(self, pairs: Iterable[int], length_ns: int) -> None:
        """Before that is sent."""
        for pair in pairs:
            self._heartbeat.granter.promise_grace(pair, self._clock(), length_ns)
