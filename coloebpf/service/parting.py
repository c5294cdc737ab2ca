"""A primary and its secondary: what the one knows of the other, and how it goes on without it."""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable

from coloebpf.errors import EngineError
from coloebpf.model import State
from coloebpf.service.arbiters.base import Grant
from coloebpf.service.asking import Reply
from coloebpf.service.config import PairConfig
from coloebpf.service.engine import Emit, Engine
from coloebpf.service.machine import REPLICATED, Trigger
from coloebpf.service.outside import Outside
from coloebpf.service.pair import Supervisor
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import AliasesTaken, EngineWord, Message, PairNote, Prepared, StateNote

DISMISS_S = 1.0  # for the secondary's answer: one write into a map and a message, or its host is in trouble
DISMISSED = 1  # what a dismissal waits for
NO_REPLICA = (State.UNPROTECTED, State.SYNCING, State.HALTED)  # a secondary that says so will not take over


class Parting(Supervisor):
    """The part of a Primary that meets the other host."""

    def __init__(self, config: PairConfig, make_engine: Callable[[Emit], Engine], outside: Outside) -> None:
        super().__init__(config, make_engine, outside)
        self._leave_ns = 0  # the secondary's leave to speak, as the heartbeats bring it
        self._told = False  # the secondary knows that it is a replica: it was sent the first commit
        self._confirmed = False  # and has said so
        self._recorded = False  # the arbiter knows that both may ask, and the secondary was not dismissed since
        self._handed = False  # nothing has come between the secondary and what it is being told
        self._dismissed = Reply()
        self._offers = False  # fell silent out of lock-step, and was never alone: the SVM may be the guest at once

    @abstractmethod
    def consider(self) -> None:
        """Something has changed that the rules may want to know."""

    @abstractmethod
    def prepared(self, request: int) -> None:
        """The secondary's answer to a `prepare`."""

    @abstractmethod
    def aliases_taken(self, request: int) -> None:
        """The secondary's answer to `aliases`."""

    def lease(self, deadline_ns: int) -> None:
        """The secondary lets this host speak until then."""
        self._leave_ns = deadline_ns
        if self.machine.state in REPLICATED:
            self.set_deadline(deadline_ns)

    def link_up(self, peer: PairNote | None) -> None:
        """See Supervisor. The state may have changed since this side's hello."""
        super().link_up(peer)
        # Of these only news mean something; but an offer may have met no link, and is as good later.
        if self._offers or self.machine.state not in (State.HALTED, State.UNPROTECTED):
            self.tell_state()
        self.consider()

    def go(self, trigger: Trigger, reason: str, write: Callable[[], object] | None = None) -> bool:
        """See Supervisor."""
        old = self.machine.state
        done = super().go(trigger, reason, write)
        if self.machine.state is not old:
            self._offers = old in REPLICATED and self.machine.state is State.HALTED
        return done

    def received(self, message: Message) -> None:
        """See Supervisor."""
        match message:
            case StateNote():
                self.peer_says(message.state, live=True)
                self.consider()
            case Prepared():
                self.prepared(message.request)
            case AliasesTaken():
                self.aliases_taken(message.request)
            case EngineWord():
                self.engine_word(message)

    def peer_says(self, state: State, live: bool) -> None:
        """See Supervisor."""
        self.peer_state = state
        if state is not State.SYNCING:
            self._begins_anew()
        if state in REPLICATED:
            self._confirmed = self._told
        elif state is State.PROMOTED:
            self.go(Trigger.REFUSED, "the secondary has taken over")
        elif state in NO_REPLICA and not self._dismissed.came(DISMISSED) and self.machine.state in REPLICATED:
            if state is State.SYNCING and not self._confirmed:
                if self._told and not live:
                    self.tell_committed()  # the link was down when it should have heard
            elif not self.machine.alone_pending:
                self._recorded = False
                self.spawn(self._certainly_alone(f"the secondary is {state.name.lower()}"))

    def link_down(self) -> None:
        """See Supervisor."""
        super().link_down()
        self._begins_anew()

    def _begins_anew(self) -> None:
        """Before the first commit the secondary may be another one when it is ready again, and is told all anew."""
        if self.machine.state is State.SYNCING:
            self._recorded = self._handed = False

    async def dismiss(self) -> bool:
        """Makes sure that the secondary does not take over; False if it can't be asked, or does not answer.

        A commit that comes now must not make it a replica again: none counts before the next protection.
        """
        self._recorded = False
        self._dismissed.expect(DISMISSED)
        note = StateNote(self.number, State.SYNCING, self.out.control.state(self.number).epoch)
        return self.out.send(note) and await self._dismissed.within(DISMISS_S)

    def secondary_gone(self, reason: str) -> None:
        """The PVM lives, its SVM does not."""
        self.engine_ready = False
        if self.machine.state is State.SYNCING:
            self.go(Trigger.FAILED, reason)
        elif self.machine.state in REPLICATED and not self.machine.alone_pending:
            self.go(Trigger.PEER_LOST, reason)
            self.spawn(self._part(reason))

    async def _part(self, reason: str) -> None:
        """A living secondary's word is enough, so that no arbiter turns its host off for nothing."""
        if await self.dismiss():
            await self._certainly_alone(reason)
        elif self.machine.alone_pending:
            self.right.ask()

    def peer_back(self) -> None:
        """See Supervisor."""
        super().peer_back()
        self.consider()

    async def _certainly_alone(self, reason: str) -> None:
        if self.right.asked:
            return
        self.go(Trigger.PEER_LOST, reason)
        await self.take_over(Grant(), reason)

    async def take_over(self, grant: Grant, reason: str) -> None:
        """See Supervisor: what was held leaves, and all that comes passes."""
        if not self.machine.can(Trigger.GRANTED):
            return
        self.engine_ready = False
        self.set_deadline(grant.deadline_ns or 0)
        self.go(Trigger.GRANTED, reason)
        self.out.control.kick()
        self.right.hold(grant)
        self.say(logging.WARNING, "the guest goes on without protection", reason=reason)
        try:
            await self.engine.failover()
        except EngineError as e:
            self.say(logging.WARNING, "the engine could not give up the secondary", error=e)

    def tell_committed(self) -> None:
        """To the secondary, which is a replica from then on."""
        self.out.send(messages.Committed(self.number, self.out.control.state(self.number).epoch))
        if not self._told:
            self._told, self.peer_state = True, State.LOCKSTEP if self.peer_state is not None else None
