"""The states of a pair on one host: every transition there is, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from coloebpf.errors import MachineError
from coloebpf.model import Role, State

__all__ = ["TRANSITIONS", "Change", "Machine", "Role", "State", "Trigger"]

PRIMARY, SECONDARY = Role.PRIMARY, Role.SECONDARY
UNPROTECTED, SYNCING, LOCKSTEP, CHECKPOINTING = State.UNPROTECTED, State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING
PASSTHROUGH, PROMOTED, HALTED = State.PASSTHROUGH, State.PROMOTED, State.HALTED


class Trigger(StrEnum):
    """What can happen to a pair."""

    PROTECT = "protect"  # an operator, or the other host, begins the protection
    SYNCED = "synced"  # the first copy is whole
    SUSPENDED = "suspended"  # the SVM's output proves nothing from here on
    COMMITTED = "committed"  # the secondary has the whole state
    FAILED = "failed"  # a checkpoint did not come about
    PEER_LOST = "peer_lost"  # the other host, or its part in this pair, is not heard of on any path
    GRANTED = "granted"  # it is certain that this host may go on alone
    REFUSED = "refused"  # the other one may
    LEASE_LOST = "lease_lost"  # the right to speak has ended, or was given away
    UNPROTECT = "unprotect"
    PEER_BACK = "peer_back"


REPLICATED = (LOCKSTEP, CHECKPOINTING)  # the SVM's state stands behind all that the client was sent


def _table() -> dict[tuple[Role, State, Trigger], State]:
    table: dict[tuple[Role, State, Trigger], State] = {}

    def row(trigger: Trigger, roles: tuple[Role, ...], old: tuple[State, ...], new: State | None = None) -> None:
        for role in roles:
            for state in old:
                table[role, state, trigger] = state if new is None else new

    both = (PRIMARY, SECONDARY)
    row(Trigger.PROTECT, both, (UNPROTECTED,), SYNCING)
    row(Trigger.PROTECT, (PRIMARY,), (PASSTHROUGH,), SYNCING)
    # A new protection overwrites the SVM, whatever it was; but for a promoted one, which is the guest now.
    row(Trigger.PROTECT, (SECONDARY,), (SYNCING, LOCKSTEP, CHECKPOINTING, HALTED), SYNCING)
    row(Trigger.SYNCED, both, (SYNCING,), LOCKSTEP)
    # Also before the first commit: what the PVM sends after it stood still is not in the copy, so it has to be held.
    row(Trigger.SUSPENDED, (PRIMARY,), (SYNCING, LOCKSTEP, CHECKPOINTING), CHECKPOINTING)
    # The secondary is no replica before the first commit, and must not take over.
    row(Trigger.SUSPENDED, (SECONDARY,), (SYNCING,))
    row(Trigger.SUSPENDED, (SECONDARY,), (LOCKSTEP, CHECKPOINTING), CHECKPOINTING)
    row(Trigger.COMMITTED, both, (CHECKPOINTING,), LOCKSTEP)
    # Behind `suspended` the old SVM may have been touched: only the next commit leads out.
    row(Trigger.FAILED, both, REPLICATED)
    row(Trigger.FAILED, both, (SYNCING,), UNPROTECTED)
    row(Trigger.PEER_LOST, both, tuple(State))
    row(Trigger.PEER_BACK, both, tuple(State))
    row(Trigger.GRANTED, (PRIMARY,), REPLICATED, PASSTHROUGH)
    row(Trigger.GRANTED, (SECONDARY,), REPLICATED, PROMOTED)
    for trigger in (Trigger.REFUSED, Trigger.LEASE_LOST):
        row(trigger, (PRIMARY,), (SYNCING, LOCKSTEP, CHECKPOINTING, PASSTHROUGH), HALTED)
        row(trigger, (SECONDARY,), (SYNCING, LOCKSTEP, CHECKPOINTING, PROMOTED), HALTED)
    # A primary that remembers nothing, after a reboot say, while the guest runs on the other host.
    row(Trigger.REFUSED, (PRIMARY,), (UNPROTECTED,), HALTED)
    row(Trigger.UNPROTECT, (PRIMARY,), (SYNCING, LOCKSTEP, CHECKPOINTING, PASSTHROUGH, HALTED), UNPROTECTED)
    row(Trigger.UNPROTECT, (SECONDARY,), (SYNCING, LOCKSTEP, CHECKPOINTING, HALTED), UNPROTECTED)
    return table


TRANSITIONS: Mapping[tuple[Role, State, Trigger], State] = MappingProxyType(_table())


@dataclass(frozen=True)
class Change:
    """One fired trigger; `old` and `new` may be the same. `at_ns`: CLOCK_MONOTONIC."""

    old: State
    new: State
    trigger: Trigger
    at_ns: int


class Machine:
    """State of one pair on one host. Listeners hear of each change after it, in the order they were added.

    `alone_pending`: the other side was lost while the SVM was a replica, and nobody has said yet who may go on alone.
    Only then can GRANTED come.
    """

    def __init__(self, role: Role, state: State, clock: Callable[[], int]) -> None:
        self.role, self.state = role, state
        self.alone_pending = False
        self.listeners: list[Callable[[Change], None]] = []
        self._clock = clock

    def can(self, trigger: Trigger) -> bool:
        """fire() would not refuse it."""
        if trigger is Trigger.GRANTED and not self.alone_pending:
            return False
        return (self.role, self.state, trigger) in TRANSITIONS

    def fire(self, trigger: Trigger) -> Change:
        """Raises MachineError, and changes nothing, if `trigger` can't happen in this state."""
        if not self.can(trigger):
            missing = " while the other side is not lost" if trigger is Trigger.GRANTED else ""
            raise MachineError(
                f"{trigger} can't happen to a {self.role.name.lower()} in {self.state.name.lower()}{missing}"
            )
        old = self.state
        self.state = TRANSITIONS[self.role, old, trigger]
        if trigger is Trigger.PEER_LOST:
            self.alone_pending = old in REPLICATED
        elif trigger is Trigger.PEER_BACK or self.state not in REPLICATED:
            self.alone_pending = False
        change = Change(old, self.state, trigger, self._clock())
        for listener in self.listeners:
            listener(change)
        return change
