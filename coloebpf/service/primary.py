"""The primary's part of a pair: when to make a checkpoint, in which order, and what if the secondary is gone."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coloebpf.errors import ArbiterError, EngineError, PairError
from coloebpf.model import State
from coloebpf.service.arbiters.base import Grant, Refusal
from coloebpf.service.checkpoints import Ledger, Reply
from coloebpf.service.comparer import Finding
from coloebpf.service.config import PairConfig
from coloebpf.service.engine import (
    Committed,
    DomainGone,
    Emit,
    Engine,
    EngineEvent,
    Failed,
    Ready,
    SecondaryGone,
    Suspended,
)
from coloebpf.service.machine import REPLICATED, Trigger
from coloebpf.service.pair import Outside, Supervisor
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import Message, Prepare, Prepared, StateNote
from coloebpf.service.rules import Timings, Wish, decide

PREPARE_S = 1.0  # for the secondary's answer: one write into a map and a message, or its host is in trouble
DISMISS_S = 1.0  # likewise
RETRY_S = 0.5  # between two tries to begin a protection
DISMISSED = 1  # what a dismissal waits for
NO_REPLICA = (State.UNPROTECTED, State.SYNCING, State.HALTED)  # a secondary that says so will not take over


class Primary(Supervisor):
    """Protects a guest that runs on this host."""

    def __init__(self, config: PairConfig, make_engine: Callable[[Emit], Engine], outside: Outside) -> None:
        super().__init__(config, make_engine, outside)
        self.ledger = Ledger(Timings.of(config))
        self._leave_ns = 0  # the secondary's leave to speak, as the heartbeats bring it
        self._told = False  # the secondary knows that it is a replica: it was sent the first commit
        self._confirmed = False  # and has said so
        self._recorded = False  # the arbiter knows that both may ask now
        self._timer: asyncio.TimerHandle | None = None
        self._prepared, self._dismissed = Reply(), Reply()
        self._beginning: asyncio.Task[None] | None = None

    def resume(self) -> None:
        """See Supervisor. A checkpoint that was under way is made anew: nobody knows how far it came."""
        self.ledger.begin(self.out.clock())
        self._told = self._confirmed = self.machine.state is State.LOCKSTEP
        self._recorded = self.machine.state in REPLICATED

    async def stop(self) -> None:
        """See Supervisor."""
        self._look_again(0)
        await super().stop()

    def reconfigure(self, config: PairConfig) -> None:
        """See Supervisor."""
        super().reconfigure(config)
        self.ledger.times = Timings.of(config)
        self.consider()

    # ---- when ------------------------------------------------------------------------------------------------------

    def found(self, finding: Finding) -> None:
        """The comparer has found something."""
        if finding.epoch == self.out.control.state(self.number).epoch:  # else a checkpoint has settled it
            self.ledger.found(finding, self.out.clock())
            self.consider()

    def room_is_low(self) -> None:
        """The walk says that little room is left for held packets or flows."""
        if self.machine.state is State.LOCKSTEP:
            self.ledger.room_is_low()
            self.consider()

    def consider(self) -> None:
        """Does what the rules say, and looks again when they want to."""
        self._look_again(0)
        if self.machine.state is State.SYNCING and not self._recorded:
            self._begin()
            return
        if not self.engine_ready or self.machine.alone_pending:
            return
        now = self.out.clock()
        decision = decide(self.ledger.view(now, self.machine.state))
        if decision.mode != self.ledger.mode:
            self.ledger.change_mode(decision.mode, decision.mode_reason, now)
            self.say(logging.WARNING, "mode", mode=decision.mode, reason=decision.mode_reason)
        if decision.overdue:
            self._failed(f"no commit in {self.config.commit_timeout_ms} ms", fatal=True)
            return
        if decision.request is not None:
            self._request(decision.request)
            decision = decide(self.ledger.view(now, self.machine.state))
        if decision.not_before_ns:
            self._look_again(max(1, decision.not_before_ns - now))

    def _look_again(self, after_ns: int) -> None:
        """At one time only; 0: not at all."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(after_ns / 1e9, self.consider) if after_ns else None

    # ---- how -------------------------------------------------------------------------------------------------------

    def _request(self, wish: Wish) -> None:
        pending = self.ledger.requested(wish, self.out.clock())
        self.say(logging.INFO, "checkpoint", trigger=wish.trigger, reason=wish.reason, request=pending.number)
        self.spawn(self._ask_engine(pending.number))

    async def _ask_engine(self, request: int) -> None:
        try:
            if not self.engine.signals_suspended:
                await self._prepare(request)
            await self.engine.request_checkpoint()
        except (EngineError, PairError) as e:
            if self.ledger.pending is not None and self.ledger.pending.number == request:
                self._failed(str(e), fatal=False)

    async def _prepare(self, request: int) -> None:
        """The careful order: from here on nothing proves anything, then the secondary forgets its translations.

        Raises PairError; what was begun leads on to the next checkpoint.
        """
        if self.peer_state is None:
            raise PairError("there is no link to the secondary")
        if self.machine.state is State.LOCKSTEP:
            self.go(Trigger.SUSPENDED, "the secondary prepares")
        self._prepared.expect(request)
        self.out.send(Prepare(self.number, request))
        if not await self._prepared.within(PREPARE_S):
            raise PairError(f"the secondary has not prepared in {PREPARE_S:g} s")

    def engine_event(self, event: EngineEvent) -> None:
        """See Supervisor."""
        match event:
            case Ready():
                self.engine_ready = True
                self.say(logging.INFO, "engine is ready", engine=self.engine.name)
            case Suspended():
                self._suspended(event.requested)
            case Committed():
                self._committed()
            case Failed():
                self._failed(event.reason, event.fatal)
            case SecondaryGone():
                self._secondary_gone(event.reason)
            case DomainGone():
                self.engine_ready = False
                self.go(Trigger.LEASE_LOST, event.reason)
        self.consider()

    def _suspended(self, requested: bool) -> None:
        if self.machine.state is State.SYNCING and self.out.arbiter.leased:
            self.set_deadline(self._leave_ns)
        if self.go(Trigger.SUSPENDED, "the PVM stands still", lambda: self.out.control.suspend(self.number)):
            self.out.send(messages.Suspended(self.number, self.out.control.state(self.number).epoch))
        if not requested:
            self.ledger.unasked(self.out.clock())
            self.say(logging.WARNING, "the engine has made a checkpoint of its own accord", engine=self.engine.name)

    def _committed(self) -> None:
        sent = 0

        def commit() -> None:
            nonlocal sent
            sent = self.out.control.commit(self.number)

        if not self.go(Trigger.COMMITTED, "the secondary has the whole state", commit):
            return
        self._tell_committed()
        done = self.ledger.committed(self.out.clock())
        took_us = (done.committed_ns - done.requested_ns) // 1000
        self.say(logging.INFO, "checkpoint committed", trigger=done.wish.trigger, took_us=took_us, released=sent)

    def _tell_committed(self) -> None:
        self.out.send(messages.Committed(self.number, self.out.control.state(self.number).epoch))
        if not self._told:
            self._told, self.peer_state = True, State.LOCKSTEP if self.peer_state is not None else None

    def _failed(self, reason: str, fatal: bool) -> None:
        self.say(logging.WARNING, "checkpoint failed", reason=reason, fatal=fatal)
        self.ledger.gave_up(PairError(reason))
        if fatal:
            self._secondary_gone(reason)
        elif self.machine.state in REPLICATED:
            self.go(Trigger.FAILED, reason)
        self.consider()

    # ---- with the secondary ----------------------------------------------------------------------------------------

    def lease(self, deadline_ns: int) -> None:
        """The secondary lets this host speak until then."""
        self._leave_ns = deadline_ns
        if self.machine.state in REPLICATED:
            self.set_deadline(deadline_ns)

    def link_up(self, peer: messages.PairNote | None) -> None:
        """See Supervisor. The state may have changed since this side's hello."""
        super().link_up(peer)
        if self.machine.state not in (State.HALTED, State.UNPROTECTED):  # of these, only news mean something
            self.tell_state()
        self.consider()

    def received(self, message: Message) -> None:
        """See Supervisor."""
        match message:
            case StateNote():
                self.peer_says(message.state, live=True)
                self.consider()
            case Prepared():
                self._prepared.came(message.request)

    def peer_says(self, state: State, live: bool) -> None:
        """See Supervisor."""
        self.peer_state = state
        if state in REPLICATED:
            self._confirmed = self._told
        elif state is State.PROMOTED:
            self.go(Trigger.REFUSED, "the secondary has taken over")
        elif state in NO_REPLICA and not self._dismissed.came(DISMISSED) and self.machine.state in REPLICATED:
            if state is State.SYNCING and not self._confirmed:
                if self._told and not live:
                    self._tell_committed()  # the link was down when it should have heard
            elif not self.machine.alone_pending:
                self.spawn(self._certainly_alone(f"the secondary is {state.name.lower()}"))

    async def _dismiss(self) -> bool:
        """Makes sure that the secondary does not take over; False if it can't be asked, or does not answer."""
        self._dismissed.expect(DISMISSED)
        note = StateNote(self.number, State.SYNCING, self.out.control.state(self.number).epoch)
        return self.out.send(note) and await self._dismissed.within(DISMISS_S)

    def _secondary_gone(self, reason: str) -> None:
        self.engine_ready = False
        if self.machine.state is State.SYNCING:
            self.go(Trigger.FAILED, reason)
        elif self.machine.state in REPLICATED and not self.machine.alone_pending:
            self.go(Trigger.PEER_LOST, reason)
            self.spawn(self._part(reason))

    async def _part(self, reason: str) -> None:
        """A living secondary's word is enough, so that no arbiter turns its host off for nothing."""
        if await self._dismiss():
            await self._certainly_alone(reason)
        elif self.machine.alone_pending:
            self.ask()

    def peer_back(self) -> None:
        """See Supervisor."""
        super().peer_back()
        self.consider()

    async def _certainly_alone(self, reason: str) -> None:
        if self._asking is not None:
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
        self.hold_right(grant)
        self.say(logging.WARNING, "the guest goes on without protection", reason=reason)
        try:
            await self.engine.failover()
        except EngineError as e:
            self.say(logging.WARNING, "the engine could not give up the secondary", error=e)

    # ---- operators -------------------------------------------------------------------------------------------------

    async def protect(self) -> None:
        """See Supervisor. The first checkpoint follows when both sides are ready."""
        self.need(Trigger.PROTECT, "unprotect it first" if self.machine.state is State.HALTED else "it is protected")
        self._told = self._confirmed = self._recorded = False
        self.ledger = Ledger(self.ledger.times, commits=self.ledger.commits)
        self.ledger.begin(self.out.clock())
        self.go(Trigger.PROTECT, "asked for by an operator")
        self.consider()

    def _begin(self) -> None:
        """Both sides and the arbiter must be ready before there is a first checkpoint."""
        leased = self.out.arbiter.leased
        ready = self.engine_ready and self.peer_state is State.SYNCING
        if ready and (not leased or self._leave_ns > self.out.clock()) and self._beginning is None:
            self._beginning = self.spawn(self._record())
        elif self._beginning is None:
            self._look_again(int(RETRY_S * 1e9))

    async def _record(self) -> None:
        try:
            self.let_right_go()
            self.set_deadline(0)  # the secondary is no replica: nobody else can speak for the guest
            await self.out.arbiter.begin(self.config)
            self._recorded = True
        except ArbiterError as e:
            self.say(logging.WARNING, "the protection can't begin yet", error=e)
            await asyncio.sleep(RETRY_S)
        finally:
            self._beginning = None
        self.consider()

    async def unprotect(self) -> None:
        """See Supervisor. Only when the secondary can't take over any more."""
        self.need(Trigger.UNPROTECT, "there is no protection to end")
        sure = self.machine.state not in REPLICATED or await self._dismiss()
        if not sure and self.out.arbiter.promotes and not self.out.arbiter.leased:
            raise PairError(f"pair {self.config.name}: the secondary does not answer, and might take over")
        try:
            answer = await self.out.arbiter.release(self.config)
        except ArbiterError as e:
            if not sure or self.machine.state is State.HALTED:
                raise PairError(f"pair {self.config.name}: {e}") from e
            answer = Grant()
        if isinstance(answer, Refusal):
            raise PairError(f"pair {self.config.name}: the guest may run on the other host: {answer.reason}")
        self.let_right_go()
        self.set_deadline(0)
        self.go(Trigger.UNPROTECT, "asked for by an operator")
        self.out.control.kick()

    async def checkpoint(self) -> None:
        """See Supervisor."""
        if self.machine.state not in REPLICATED or not self.engine_ready:
            raise PairError(
                f"pair {self.config.name} is {self.machine.state.name.lower()}: there is no secondary to copy to"
            )
        done = self.ledger.asked()
        self.consider()
        await done

    async def failover(self) -> None:
        """See Supervisor: this host falls silent and says so; that is all the certainty the secondary needs."""
        if self.machine.state not in REPLICATED or self.machine.alone_pending or self.peer_state not in REPLICATED:
            raise PairError(f"pair {self.config.name}: there is no secondary that could take over")
        self.go(Trigger.LEASE_LOST, "an operator lets the secondary take over")
