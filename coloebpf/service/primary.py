"""The primary's part of a pair: when to make a checkpoint, and how."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from coloebpf.errors import ColoError, EngineError, PairError
from coloebpf.model import State
from coloebpf.service.asking import Asker
from coloebpf.service.checkpoints import Ledger
from coloebpf.service.comparer import Finding
from coloebpf.service.config import PairConfig
from coloebpf.service.engine import (
    Committed,
    DomainGone,
    Emit,
    Engine,
    EngineEvent,
    Failed,
    Inquiring,
    Overwriting,
    Ready,
    SecondaryGone,
    Suspended,
)
from coloebpf.service.machine import REPLICATED, Trigger
from coloebpf.service.outside import Outside
from coloebpf.service.peer import messages
from coloebpf.service.protecting import Protecting
from coloebpf.service.rules import Timings, Wish, decide


class Primary(Protecting):
    """Protects a guest that runs on this host."""

    def __init__(self, config: PairConfig, make_engine: Callable[[Emit], Engine], outside: Outside) -> None:
        super().__init__(config, make_engine, outside)
        self.ledger = Ledger(Timings.of(config))
        self._timer: asyncio.TimerHandle | None = None
        self._asker = Asker(self.number, outside.send, self._stop_proving, self._ask_engine, self._give_up)
        self._outdated = False  # the checkpoint under way does not have all that the client was sent
        self._missed = False  # the one under way began while there was no protection

    def resume(self) -> None:
        """See Supervisor. A checkpoint that was under way is made anew: nobody knows how far it came."""
        self.ledger.begin(self.out.clock())
        self._told = self._confirmed = self.machine.state is State.LOCKSTEP
        self._recorded = self.machine.state in REPLICATED
        if self._recorded:
            self.spawn(self._await_engine())

    async def _await_engine(self) -> None:
        """Without an engine nothing can be asked for, so no checkpoint is ever overdue."""
        await asyncio.sleep(self.config.commit_timeout_ms / 1000)
        if self.engine_ready or self.machine.state not in REPLICATED:
            return
        reason = f"the engine has not come back in {self.config.commit_timeout_ms} ms"
        if not isinstance(self.engine, Inquiring):  # without the PVM the SVM is all that is left of the guest
            self.say(logging.ERROR, "nobody can ask for checkpoints: unprotect the pair, or fail over", reason=reason)
            return
        try:
            lives = await self.engine.guest_lives()
        except EngineError as e:
            lives, reason = True, f"{reason}, and nobody can say whether the guest lives: {e}"
        if self.engine_ready:
            return
        if lives:
            self.secondary_gone(reason)
        else:
            self.engine_event(DomainGone(f"{reason}, and the guest is gone"))

    def tick(self) -> None:
        """See Supervisor. A service that stood still for too long makes the SVM a replica anew, as at its start."""
        opened = self.machine.state in REPLICATED and 0 < self.open_after_ns < self.out.clock()
        if opened:  # the programs have let everything pass; before they compare again they must hold
            self._outdated = self.ledger.pending is not None
            reason = "this service stood still, and everything has passed meanwhile"
            hold = partial(self.out.control.set_state, self.number, State.CHECKPOINTING)
            self.go(Trigger.SUSPENDED, reason, hold)
        super().tick()
        if opened:
            self.consider()

    async def stop(self) -> None:
        """See Supervisor."""
        self.look_again(0)
        self._asker.stop()
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
        self.look_again(0)
        if self.machine.state is State.SYNCING and not self._recorded:
            self.begin()
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
            self.look_again(max(1, decision.not_before_ns - now))

    def look_again(self, after_ns: int) -> None:
        """See Protecting. At one time only; 0: not at all."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(after_ns / 1e9, self.consider) if after_ns else None

    # ---- how -------------------------------------------------------------------------------------------------------

    def _request(self, wish: Wish) -> None:
        pending = self.ledger.requested(wish, self.out.clock())
        if self.engine.signals_suspended:
            self._ask_engine(pending.number)
        else:
            self._asker.prepare(pending.number)
        # Behind the deed: a line takes longer to write than the message.
        self.say(logging.INFO, "checkpoint", trigger=wish.trigger, reason=wish.reason, request=pending.number)

    def _ask_engine(self, request: int) -> None:
        self.spawn(self._asked(request))

    async def _asked(self, request: int) -> None:
        try:
            await self.engine.request_checkpoint()
        except EngineError as e:
            self._give_up(request, e)

    def _give_up(self, request: int, why: ColoError) -> None:
        if self.ledger.pending is not None and self.ledger.pending.number == request:
            self._failed(str(why), fatal=False)

    def _stop_proving(self, then: Callable[[], object]) -> None:
        if self.peer_state is None:
            raise PairError("there is no link to the secondary")

        def stop() -> None:
            self.out.control.set_state(self.number, State.CHECKPOINTING)
            then()

        if self.machine.state is State.LOCKSTEP:
            self.go(Trigger.SUSPENDED, "the secondary prepares", stop)
        else:
            then()

    def prepared(self, request: int) -> None:
        """See Parting."""
        self._asker.prepared(request)

    def engine_event(self, event: EngineEvent) -> None:
        """See Supervisor."""
        match event:
            case Ready():
                self.engine_ready = True
                self.say(logging.INFO, "engine is ready", engine=self.engine.name)
            case Overwriting():
                self._overwriting()
            case Suspended():
                self._suspended(event.requested)
            case Committed():
                self._committed()
            case Failed():
                self._failed(event.reason, event.fatal)
            case SecondaryGone():
                self.secondary_gone(event.reason)
            case DomainGone():
                self.engine_ready = False
                self.go(Trigger.LEASE_LOST, event.reason)
        self.consider()

    def _overwriting(self) -> None:
        """From here on a commit is due, also of one that the engine has begun by itself."""
        if self.machine.state in REPLICATED:
            hold = partial(self.out.control.set_state, self.number, State.CHECKPOINTING)
            self.go(Trigger.SUSPENDED, "the SVM is about to be overwritten", hold)
            self.ledger.unasked(self.out.clock())

    def _suspended(self, requested: bool) -> None:
        if self.machine.state not in (State.SYNCING, *REPLICATED) or not self._recorded:
            # libxl's first one comes by itself; it makes no replica if the secondary's service was not ready for it.
            self.say(logging.INFO, "a checkpoint outside of a protection", engine=self.engine.name)
            self._missed = self.ledger.pending is not None
            return
        self._missed = False
        if self.machine.state is State.SYNCING:
            self.ledger.holds(self.out.clock())
            if self.out.arbiter.leased:
                self.set_deadline(self._leave_ns)
        if self.go(Trigger.SUSPENDED, "the PVM stands still", lambda: self.out.control.suspend(self.number)):
            self.out.send(messages.Suspended(self.number, self.out.control.state(self.number).epoch))
        if not requested:
            self.ledger.unasked(self.out.clock())
            self.say(logging.INFO, "the engine has made a checkpoint of its own accord", engine=self.engine.name)

    def _committed(self) -> None:
        if self._outdated:
            self._failed("it was asked for before everything passed uncompared", fatal=False)
            return
        if self._missed:
            self._missed = False
            self._failed("the PVM stood still while the secondary was not ready for it", fatal=False)
            return
        sent = 0

        def commit() -> None:
            nonlocal sent
            sent = self.out.control.commit(self.number)

        if not self._recorded or not self.go(Trigger.COMMITTED, "the secondary has the whole state", commit):
            return
        self.tell_committed()
        done = self.ledger.committed(self.out.clock(), sent)
        took_us = (done.committed_ns - done.requested_ns) // 1000
        self.say(logging.INFO, "checkpoint committed", trigger=done.wish.trigger, took_us=took_us, released=sent)

    def _failed(self, reason: str, fatal: bool) -> None:
        self.say(logging.WARNING, "checkpoint failed", reason=reason, fatal=fatal)
        self._outdated = False
        self.ledger.gave_up(PairError(reason))
        if fatal:
            self.secondary_gone(reason)
        elif self.machine.state in REPLICATED:
            self.go(Trigger.FAILED, reason)
        self.consider()

    # ---- operators -------------------------------------------------------------------------------------------------

    async def protect(self) -> None:
        """See Supervisor. The first checkpoint follows when both sides are ready."""
        self.need(Trigger.PROTECT, "unprotect it first" if self.machine.state is State.HALTED else "it is protected")
        self._told = self._confirmed = self._recorded = False
        self.ledger = Ledger(self.ledger.times, commits=self.ledger.commits, durations=self.ledger.durations)
        self.ledger.begin(self.out.clock())
        self.go(Trigger.PROTECT, "asked for by an operator")
        self.consider()

    async def checkpoint(self) -> None:
        """See Supervisor."""
        if self.machine.state not in REPLICATED or not self.engine_ready:
            raise PairError(
                f"pair {self.config.name} is {self.machine.state.name.lower()}: there is no secondary to copy to"
            )
        done = self.ledger.asked()
        self.consider()
        await done
