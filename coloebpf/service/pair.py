"""One pair on one host: what both roles have in common. The primary's part and the secondary's are files of their own.

A supervisor hears of engine, link, heartbeats and arbiter, moves the pair's machine, and writes the result into the
dataplane before anybody is told. All of it runs on the event loop; what takes time is a task.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from coloebpf.errors import ColoError, PairError
from coloebpf.model import Role, State
from coloebpf.service.arbiters.base import Grant
from coloebpf.service.config import PairConfig
from coloebpf.service.engine import Emit, Engine, EngineEvent, Talking
from coloebpf.service.log import say
from coloebpf.service.machine import REPLICATED, TRANSITIONS, Machine, Trigger
from coloebpf.service.outside import Outside
from coloebpf.service.peer.messages import EngineWord, Message, PairNote, StateNote
from coloebpf.service.right import Right
from coloebpf.service.tasks import Tasks

log = logging.getLogger("coloebpf.pair")

MS = 1_000_000  # ns
ALIASES_PERIOD_NS = 5_000 * MS  # between two looks at which have ended: they stay for minutes after their end
THROUGH = object()
# What a state becomes when the roles were exchanged in the file: who was alone with the guest still is.
OTHER_ROLE = {
    (Role.PRIMARY, State.PROMOTED): State.PASSTHROUGH,
    (Role.SECONDARY, State.PASSTHROUGH): State.HALTED,
}


class Supervisor(ABC):
    """See Primary and Secondary. `peer_state`: what the other side said last; None while there is no link."""

    def __init__(self, config: PairConfig, make_engine: Callable[[Emit], Engine], outside: Outside) -> None:
        self.config, self.number = config, config.number
        self.out = outside
        self.engine = make_engine(self.engine_event)
        self.engine_ready = False
        self.machine = Machine(config.role, State.UNPROTECTED, outside.clock)
        self.state_since_ns, self.state_reason = outside.clock(), ""
        self.told = False  # the last change of state has been sent
        self.deadline_ns = 0
        self.open_after_ns = 0  # from then on the programs let everything pass; 0: never
        self._aliases_after_ns = 0
        self._ending_aliases: Iterator[None] | None = None  # a look under way
        self.peer_state: State | None = None
        self.right = Right(self)
        self._tasks = Tasks(self._task_failed)

    # ---- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Goes on with the state that the dataplane has. Raises EngineError if the engine can't be started."""
        kept = self.out.control.state(self.number).state
        if (self.config.role, kept) in OTHER_ROLE:
            if kept is State.PROMOTED:
                # Before the state: P2 and P1 take the place of S2 and S3 after it, and have to know what these do.
                number = self.out.aliases.keep()
                self.say(logging.INFO, "connections are known to clients by other numbers", connections=number)
            kept = OTHER_ROLE[self.config.role, kept]
            self.out.control.set_state(self.number, kept)
        if self.config.role is Role.PRIMARY and self.config.on_service_loss == "open" and kept is State.LOCKSTEP:
            # The programs may have let everything pass for a while. The next commit's copy includes that.
            self.out.control.set_state(self.number, State.CHECKPOINTING)
            kept = State.CHECKPOINTING
        self.machine.state = kept
        self.deadline_ns = self.out.control.deadline(self.number)
        self.state_reason = "as it was before the service's start"
        self.tick()
        self.say(logging.INFO, "pair is served", role=self.config.role.name.lower(), state=kept.name.lower())
        if kept in (State.PASSTHROUGH, State.PROMOTED):
            self.right.take_up()
        self.resume()
        await self.engine.start()

    @abstractmethod
    def resume(self) -> None:
        """The state is known; the engine has not been started yet."""

    async def stop(self) -> None:
        """Lets go; the dataplane goes on as it is."""
        await self._tasks.end()
        await self.engine.stop()

    async def rest(self, seconds: int) -> None:
        """This service ends, and the next one comes in `seconds` at most: a right that is to be renewed has to last."""
        await self.right.rest(seconds)

    def tick(self) -> None:
        """To be called several times in `service_loss_after_ms`: the programs see that the service lives."""
        after = self.config.service_loss_after_ms * MS
        self.open_after_ns = self.out.clock() + after if self.config.on_service_loss == "open" else 0
        self.out.control.set_open_after(self.number, self.open_after_ns)
        self._end_aliases()

    def _end_aliases(self) -> None:
        """A slice at a time; the next look begins when the last one is through."""
        if self._ending_aliases is None and self._aliases_after_ns < self.out.clock():
            self._aliases_after_ns = self.out.clock() + ALIASES_PERIOD_NS
            self._ending_aliases = self.out.aliases.end_idle()
        if self._ending_aliases is not None and next(self._ending_aliases, THROUGH) is THROUGH:
            self._ending_aliases = None

    def reconfigure(self, config: PairConfig) -> None:
        """Takes over what a reload may change in a running pair (config_reload.PairChange without `restart`)."""
        self.config = config
        self.tick()

    def note(self) -> PairNote:
        """For a hello."""
        kept = self.out.control.state(self.number)
        return PairNote(self.number, self.config.name, self.config.role, self.machine.state, kept.epoch)

    # ---- what others report ----------------------------------------------------------------------------------------

    @abstractmethod
    def engine_event(self, event: EngineEvent) -> None:
        """The engine tells something."""

    @abstractmethod
    def received(self, message: Message) -> None:
        """A message of the other side about this pair."""

    def link_up(self, peer: PairNote | None) -> None:
        """There is a session; `peer`: what the other side's hello says of the pair."""
        if peer is None or peer.role is self.config.role or peer.name != self.config.name:
            self.say(logging.ERROR, "the other host has no such pair in the other role: compare both files")
            return
        self.peer_says(peer.state, live=False)
        if isinstance(self.engine, Talking):
            self.engine.peer_up()

    def engine_word(self, message: EngineWord) -> None:
        """The other host's engine talks to this one's."""
        if isinstance(self.engine, Talking):
            self.engine.heard(message.word, message.number, message.detail)

    def link_down(self) -> None:
        """The session is over; whether the other host is lost, the heartbeats tell."""
        self.peer_state = None

    @abstractmethod
    def peer_says(self, state: State, live: bool) -> None:
        """The other side's state; `live` False: it may have changed long ago."""

    def peer_lost(self) -> None:
        """The heartbeats of neither path come any more."""
        self.go(Trigger.PEER_LOST, "no heartbeat on any path")
        if self.machine.alone_pending:
            self.right.ask()

    def peer_back(self) -> None:
        """They come again. A question to the arbiter is not taken back: its answer counts."""
        if not self.right.asked:
            self.go(Trigger.PEER_BACK, "heartbeats come again")

    # ---- states ----------------------------------------------------------------------------------------------------

    def go(self, trigger: Trigger, reason: str, write: Callable[[], object] | None = None) -> bool:
        """Fires a trigger: the dataplane first (`write`, or the new state alone), then whoever listens.

        False if it can't happen now, which is logged and no more: what is heard from outside may come late.
        """
        if not self.machine.can(trigger):
            state = self.machine.state.name.lower()
            self.say(logging.INFO, "not in this state", trigger=trigger, state=state, reason=reason)
            return False
        new = TRANSITIONS[self.config.role, self.machine.state, trigger]
        if write is not None:
            write()
        elif new is not self.machine.state:
            self.out.control.set_state(self.number, new)
        change = self.machine.fire(trigger)
        if change.new is not change.old:
            self.state_since_ns, self.state_reason = change.at_ns, reason
        level = logging.INFO if change.new in (*REPLICATED, State.SYNCING) else logging.WARNING
        names = {"old": change.old.name.lower(), "new": change.new.name.lower()}
        self.say(
            level if change.new is not change.old else logging.DEBUG, "state", **names, trigger=trigger, reason=reason
        )
        if change.new is not change.old and not (change.old in REPLICATED and change.new in REPLICATED):
            self.told = self.tell_state()
        if not self.machine.alone_pending:
            self.right.not_wanted()
        if change.old is State.SYNCING and change.new in REPLICATED and self.out.witness.is_lost(self.number):
            self.peer_lost()  # which was told when nobody was waiting for it, and is told once
        return True

    def tell_state(self) -> bool:
        """To the other side; False if there is no link."""
        return self.out.send(StateNote(self.number, self.machine.state, self.out.control.state(self.number).epoch))

    def set_deadline(self, deadline_ns: int) -> None:
        """End of this host's right to speak for the guest; 0: none."""
        self.deadline_ns = deadline_ns
        self.out.control.set_deadline(self.number, deadline_ns)

    @abstractmethod
    async def take_over(self, grant: Grant, reason: str) -> None:
        """This host goes on alone, if it still waits for that."""

    # ---- operators -------------------------------------------------------------------------------------------------

    @abstractmethod
    async def protect(self) -> None:
        """Begins the protection. Raises PairError."""

    @abstractmethod
    async def unprotect(self) -> None:
        """Ends it; the guest goes on without. Raises PairError."""

    @abstractmethod
    async def checkpoint(self) -> None:
        """Returns when one has committed. Raises PairError."""

    @abstractmethod
    async def failover(self) -> None:
        """Lets the secondary take over, or, on a host that has lost the other one, this host. Raises PairError."""

    @abstractmethod
    async def handover(self) -> None:
        """Lets the secondary take over, and never means anything else: nobody's word is in it. Raises PairError."""

    def need(self, trigger: Trigger, what: str) -> None:
        """Raises PairError if an operator's wish can't be met in this state."""
        if not self.machine.can(trigger):
            raise PairError(f"pair {self.config.name} is {self.machine.state.name.lower()}: {what}")

    # ---- tools -----------------------------------------------------------------------------------------------------

    def say(self, level: int, sentence: str, **fields: object) -> None:
        """One line of the log."""
        say(log, level, sentence, pair=self.config.name, **fields)

    def spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A task that is not forgotten, and whose failure is told."""
        return self._tasks.spawn(work)

    def _task_failed(self, error: BaseException) -> None:
        if isinstance(error, ColoError):
            self.say(logging.ERROR, "could not be done", error=error)
        else:
            log.error("a task of pair %s failed", self.config.name, exc_info=error)
