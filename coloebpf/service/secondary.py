"""The secondary's part of a pair: it follows the primary's checkpoints, and takes over when it certainly may."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from coloebpf.errors import EngineError, PairError
from coloebpf.model import State
from coloebpf.service.arbiters.base import Grant
from coloebpf.service.engine import DomainGone, EngineEvent, Failed, Ready, Replacing
from coloebpf.service.machine import REPLICATED, Trigger
from coloebpf.service.pair import Supervisor
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import EngineWord, Message, PairNote, Prepare, Prepared, StateNote

FOLLOWING = (State.SYNCING, *REPLICATED)


class Secondary(Supervisor):
    """Serves the replica of a guest that runs on the other host."""

    _taking: asyncio.Task[None] | None = None  # what the primary has handed on
    _prepared = False  # the translations were cleared for the checkpoint under way

    def resume(self) -> None:
        """See Supervisor."""
        self._grant()

    # ---- with the primary ------------------------------------------------------------------------------------------

    def link_up(self, peer: PairNote | None) -> None:
        """See Supervisor."""
        super().link_up(peer)
        self._grant()

    def received(self, message: Message) -> None:
        """See Supervisor."""
        match message:
            case StateNote():
                self.peer_says(message.state, live=True)
            case Prepare():
                answer = Prepared(self.number, message.request)
                if self._clear("the primary asks for a checkpoint", lambda: self.out.send(answer)):
                    self._prepared = True
                else:
                    self.tell_state()
            case messages.Suspended():
                if not self._prepared:
                    self._clear("the PVM stands still")
            case messages.Committed():
                self._prepared = False
                synced = self.machine.state is State.SYNCING
                self.out.control.settle_translations(self.number)
                self.go(Trigger.SYNCED if synced else Trigger.COMMITTED, "this host has the whole state")
            case EngineWord():
                self.engine_word(message)
            case messages.Aliases():
                self._take_aliases(message)

    def _take_aliases(self, message: messages.Aliases) -> None:
        """Only before the first commit: a replica's own numbers are with those of the guest from then on."""
        if self.machine.state is not State.SYNCING:
            return
        if self._taking is not None:
            self._taking.cancel()  # the primary has not waited for it
        self._taking = self.spawn(self._take(message))

    async def _take(self, message: messages.Aliases) -> None:
        try:
            for _ in self.out.aliases.clear() if message.part == 0 else ():
                await asyncio.sleep(0)
            if self.machine.state is not State.SYNCING:
                return
            self.out.aliases.take(message.entries)
        except ValueError as e:
            self.say(logging.ERROR, "the primary's connections can't be this host's: compare both files", error=e)
            return
        self.out.send(messages.AliasesTaken(self.number, message.request))

    def peer_says(self, state: State, live: bool) -> None:
        """See Supervisor. A primary that was halted as a replica's primary has given its right to this host."""
        self.peer_state = state
        if state is State.SYNCING:
            if self.machine.can(Trigger.PROTECT):
                self._prepared = False
                self.go(Trigger.PROTECT, "the primary begins a protection")
            # Also if nothing has changed: the primary waits for this host's word.
            self.tell_state()
        elif state is State.PASSTHROUGH and self.machine.state in FOLLOWING:
            self.go(Trigger.REFUSED, "the primary goes on alone")
        elif state is State.UNPROTECTED and not live and self.machine.state in REPLICATED:
            # After a reboot the primary remembers nothing, and this may be all that is left of the guest.
            self.say(logging.ERROR, "the primary knows of no protection: say `failover` here, or `protect` there")
        elif state is State.UNPROTECTED and self.machine.state in FOLLOWING:
            self.go(Trigger.UNPROTECT, "the primary's protection has ended")
        elif state is State.HALTED and live and self.machine.state in REPLICATED:
            self._offered()

    def _clear(self, reason: str, then: Callable[[], object] = lambda: None) -> bool:
        """What the old SVM's numbers were is of no use any more; it is about to be a copy of the PVM.

        `then` comes before the log's line: the primary waits for it.
        """

        def clear() -> None:
            if self.machine.state is not State.SYNCING:
                self.out.control.set_state(self.number, State.CHECKPOINTING)
            if self.engine.copies:
                self.out.control.clear_translations(self.number)
            then()

        return self.machine.state in FOLLOWING and self.go(Trigger.SUSPENDED, reason, clear)

    def go(self, trigger: Trigger, reason: str, write: Callable[[], object] | None = None) -> bool:
        """See Supervisor. Whether the primary may speak because of this host follows."""
        done = super().go(trigger, reason, write)
        self._grant()
        return done

    def _grant(self) -> None:
        """As long as it follows, the primary may speak because of this host's heartbeats."""
        following = self.machine.state in FOLLOWING and not self.machine.alone_pending
        self.out.witness.set_granting(self.number, following)

    def peer_lost(self) -> None:
        """See Supervisor. Without an arbiter this host waits for an operator."""
        self.go(Trigger.PEER_LOST, "no heartbeat on any path")
        if not self.machine.alone_pending:
            return
        if self.out.arbiter.promotes:
            self.right.ask()
        else:
            self.say(logging.ERROR, "the primary is lost, and there is no arbiter: an operator must say `failover`")

    def _offered(self) -> None:
        self.go(Trigger.PEER_LOST, "the primary has given up its right to speak")
        if self.out.arbiter.leased:  # it has to know who is alone; fencing would end a host that is well
            self.right.ask()
        else:
            self.spawn(self.take_over(Grant(), "the primary has given up its right to speak"))

    def engine_event(self, event: EngineEvent) -> None:
        """See Supervisor. Checkpoints are told by the primary, which knows when one is whole."""
        match event:
            case Ready():
                self.engine_ready = True
            case Replacing():
                self._prepared = self._clear("the SVM's next copy takes its place")
            case DomainGone():
                self.engine_ready = False
                if self.machine.can(Trigger.LEASE_LOST):
                    self.go(Trigger.LEASE_LOST, event.reason)
            case Failed():
                self.say(logging.WARNING, "engine has failed", reason=event.reason, fatal=event.fatal)
                self.engine_ready = self.engine_ready and not event.fatal

    # ---- alone -----------------------------------------------------------------------------------------------------

    async def take_over(self, grant: Grant, reason: str) -> None:
        """See Supervisor: the SVM is the guest from here on."""
        # Halted its programs drop everything already, by its own word; and what never spoke by leave has none to end.
        if self.peer_state is not State.HALTED and self.out.arbiter.leased:
            await self.out.witness.wait_safe(self.number)
        if not self.machine.can(Trigger.GRANTED):
            return
        try:
            await self.engine.failover()
        except EngineError as e:
            self.go(Trigger.LEASE_LOST, f"the SVM can't become the guest: {e}")
            return
        if not self.machine.can(Trigger.GRANTED):  # something else has happened meanwhile
            return
        self.set_deadline(grant.deadline_ns or 0)
        self.go(Trigger.GRANTED, reason)
        self.right.hold(grant)
        self.out.announce(self.config)

    # ---- operators -------------------------------------------------------------------------------------------------

    async def protect(self) -> None:
        """See Supervisor."""
        raise PairError(f"pair {self.config.name} is protected by its primary: ask there")

    async def unprotect(self) -> None:
        """See Supervisor: the SVM falls silent for good; the primary goes on alone."""
        self.need(
            Trigger.UNPROTECT, "the SVM is the guest" if self.machine.state is State.PROMOTED else "there is none"
        )
        if self.right.asked:
            raise PairError(f"pair {self.config.name}: the arbiter is being asked")
        self.go(Trigger.UNPROTECT, "asked for by an operator")

    async def checkpoint(self) -> None:
        """See Supervisor."""
        raise PairError(f"pair {self.config.name} is copied from its primary: ask there")

    async def handover(self) -> None:
        """See Supervisor."""
        raise PairError(f"pair {self.config.name} is handed over by its primary: ask there")

    async def failover(self) -> None:
        """See Supervisor. Here it is an operator's word that the primary is gone, also while an arbiter is asked."""
        if not self.machine.alone_pending:
            if self.machine.state not in REPLICATED or self.peer_state not in (State.UNPROTECTED, State.HALTED):
                raise PairError(
                    f"pair {self.config.name}: the primary is there, or this is no replica: ask the primary"
                )
            self.go(Trigger.PEER_LOST, "an operator says that the primary is gone")
            if self.out.arbiter.promotes:
                self.right.ask()
                return
        self.right.stop_asking()
        await self.take_over(Grant(), "an operator says that the primary is gone")
