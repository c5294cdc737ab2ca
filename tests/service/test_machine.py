"""The states of a pair: the whole table, and two hosts with an arbiter wandering through it at random."""

from __future__ import annotations

from functools import partial

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from coloebpf.errors import MachineError
from coloebpf.model import Role, State
from coloebpf.service.machine import TRANSITIONS, Change, Machine, Trigger

P, S = Role.PRIMARY, Role.SECONDARY
SHORT = {
    "unpr": State.UNPROTECTED, "sync": State.SYNCING, "lock": State.LOCKSTEP, "chkp": State.CHECKPOINTING,
    "pass": State.PASSTHROUGH, "prom": State.PROMOTED, "halt": State.HALTED,
}  # fmt: skip
COLUMNS = (
    Trigger.PROTECT, Trigger.SYNCED, Trigger.SUSPENDED, Trigger.COMMITTED, Trigger.FAILED, Trigger.PEER_LOST,
    Trigger.GRANTED, Trigger.REFUSED, Trigger.LEASE_LOST, Trigger.UNPROTECT, Trigger.PEER_BACK,
)  # fmt: skip
TABLE = {
    #           protect synced susp. commit failed lost grant refus lease unprot back
    P: """
        unpr    sync    -      -     -      -      unpr -     halt  -     -      unpr
        sync    -       lock   chkp  -      unpr   sync -     halt  halt  unpr   sync
        lock    -       -      chkp  -      lock   lock pass  halt  halt  unpr   lock
        chkp    -       -      chkp  lock   chkp   chkp pass  halt  halt  unpr   chkp
        pass    sync    -      -     -      -      pass -     halt  halt  unpr   pass
        prom    -       -      -     -      -      prom -     -     -     -      prom
        halt    -       -      -     -      -      halt -     -     -     unpr   halt
    """,
    S: """
        unpr    sync    -      -     -      -      unpr -     -     -     -      unpr
        sync    sync    lock   sync  -      unpr   sync -     halt  halt  unpr   sync
        lock    sync    -      chkp  -      lock   lock prom  halt  halt  unpr   lock
        chkp    sync    -      chkp  lock   chkp   chkp prom  halt  halt  unpr   chkp
        pass    -       -      -     -      -      pass -     -     -     -      pass
        prom    -       -      -     -      -      prom -     halt  halt  -      prom
        halt    sync    -      -     -      -      halt -     -     -     unpr   halt
    """,
}
CELLS = [
    (role, SHORT[words[0]], trigger, SHORT.get(word))
    for role, text in TABLE.items()
    for words in map(str.split, text.strip().splitlines())
    for trigger, word in zip(COLUMNS, words[1:], strict=True)
]


def machine(role: Role, state: State, *, pending: bool = False) -> Machine:
    made = Machine(role, state, clock=lambda: 42)
    made.alone_pending = pending
    return made


def test_the_table_here_is_whole() -> None:
    assert len(CELLS) == len(Role) * len(State) * len(Trigger)


@pytest.mark.parametrize(("role", "old", "trigger", "new"), CELLS)
def test_a_cell(role: Role, old: State, trigger: Trigger, new: State | None) -> None:
    heard: list[Change] = []
    pair = machine(role, old, pending=True)
    pair.listeners.append(heard.append)
    if new is None:
        assert not pair.can(trigger)
        with pytest.raises(
            MachineError, match=rf"{trigger} can't happen to a {role.name.lower()} in {old.name.lower()}"
        ):
            pair.fire(trigger)
        assert (pair.state, pair.alone_pending, heard) == (old, True, [])
    else:
        assert pair.can(trigger)
        change = pair.fire(trigger)
        assert change == Change(old, new, trigger, 42)
        assert (pair.state, heard) == (new, [change])


def test_nothing_grants_while_the_other_side_is_there() -> None:
    pair = machine(P, State.LOCKSTEP)
    assert not pair.can(Trigger.GRANTED)
    with pytest.raises(MachineError, match="while the other side is not lost"):
        pair.fire(Trigger.GRANTED)
    assert pair.state is State.LOCKSTEP


@pytest.mark.parametrize(
    ("role", "state", "triggers", "pending"),
    [
        (P, State.LOCKSTEP, [Trigger.PEER_LOST], True),
        (S, State.CHECKPOINTING, [Trigger.PEER_LOST], True),
        (P, State.LOCKSTEP, [Trigger.PEER_LOST, Trigger.SUSPENDED, Trigger.COMMITTED], True),
        (P, State.LOCKSTEP, [Trigger.PEER_LOST, Trigger.PEER_BACK], False),
        (P, State.LOCKSTEP, [Trigger.PEER_LOST, Trigger.GRANTED], False),
        (P, State.LOCKSTEP, [Trigger.PEER_LOST, Trigger.REFUSED], False),
        (P, State.LOCKSTEP, [Trigger.PEER_LOST, Trigger.UNPROTECT], False),
        (P, State.SYNCING, [Trigger.PEER_LOST], False),  # the secondary is no replica: nobody else could go on
        (S, State.SYNCING, [Trigger.PEER_LOST], False),
        (P, State.PASSTHROUGH, [Trigger.PEER_LOST], False),
        (S, State.PROMOTED, [Trigger.PEER_LOST], False),
    ],
)
def test_who_waits_for_the_right_to_go_on_alone(
    role: Role, state: State, triggers: list[Trigger], pending: bool
) -> None:
    pair = machine(role, state)
    for trigger in triggers:
        pair.fire(trigger)
    assert pair.alone_pending is pending


def test_the_table_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        TRANSITIONS[P, State.HALTED, Trigger.GRANTED] = State.PASSTHROUGH  # type: ignore[index]


RARE = st.integers(0, 3).map(lambda dice: dice == 3)  # what ends a walk's interesting part


class TwoHosts(RuleBasedStateMachine):
    """A primary, a secondary, an engine, an arbiter, and messages that take their time or are lost with the link.

    The rules are what supervisors do (coloebpf.service.pair). The arbiter says yes to one host, and remembers whom until that one gives it
    back: a lease that ends takes the right to speak, it does not make the other side's old copy a new one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hosts = {P: machine(P, State.UNPROTECTED), S: machine(S, State.UNPROTECTED)}
        self.asked: set[Role] = set()  # the arbiter has not answered yet
        self.holder: Role | None = None
        self.link = True
        self.mail: list[State] = []  # from primary to secondary: the state it has gone to
        self.unproven = True  # the client was sent what the SVM's state does not include
        self.touched = False  # a checkpoint has begun to change the SVM, and is not whole
        for role, pair in self.hosts.items():
            pair.listeners.append(partial(self.changed, role))

    # ---- what every change is checked for --------------------------------------------------------------------------

    def changed(self, role: Role, change: Change) -> None:
        if change.old is State.HALTED and change.new is not State.HALTED:
            assert change.trigger in (Trigger.PROTECT, Trigger.UNPROTECT)
        if change.new is State.PASSTHROUGH and change.old is not State.PASSTHROUGH:
            assert change.trigger is Trigger.GRANTED
            assert self.holder is P
        if change.new is State.PROMOTED and change.old is not State.PROMOTED:
            assert change.trigger is Trigger.GRANTED
            assert self.holder is S
            assert not self.unproven, "an old copy would go on in place of what the client knows"
        if role is P and change.new is not change.old:
            self.mail.append(change.new)

    @invariant()
    def unproven_output(self) -> None:
        if self.hosts[P].state in (State.UNPROTECTED, State.SYNCING, State.PASSTHROUGH):
            self.unproven = True

    @invariant()
    def no_release_beside_a_half_made_copy(self) -> None:
        if self.touched:
            assert self.hosts[P].state is not State.LOCKSTEP

    @invariant()
    def one_speaker(self) -> None:
        if self.hosts[S].state is State.PROMOTED:
            assert self.hosts[P].state in (State.LOCKSTEP, State.CHECKPOINTING, State.HALTED), "two hosts speak"

    def fire(self, role: Role, trigger: Trigger) -> bool:
        """What a supervisor does with what it hears: if it can't be in this state, it is told and no more."""
        pair = self.hosts[role]
        if not pair.can(trigger):
            before = pair.state
            with pytest.raises(MachineError):
                pair.fire(trigger)
            assert pair.state is before
            return False
        pair.fire(trigger)
        return True

    @initialize(stage=st.integers(0, 3), cut=st.booleans())
    def begin(self, stage: int, cut: bool) -> None:
        """Random steps alone seldom come so far."""
        for step in (self.protect, self.suspended, self.committed)[:stage]:
            step()
            while self.mail:
                self.delivered()
        if stage == 3:
            assert [pair.state for pair in self.hosts.values()] == [State.LOCKSTEP, State.LOCKSTEP]
        if cut:
            self.cut()

    # ---- operators -------------------------------------------------------------------------------------------------

    @rule()
    def protect(self) -> None:
        if self.hosts[S].state is not State.PROMOTED:  # a pair whose roles have to be exchanged first
            self.fire(P, Trigger.PROTECT)

    @rule(really=RARE)
    def unprotect(self, really: bool) -> None:
        """The primary lets everything pass only when the secondary is no replica, or the right to go on is the primary's."""
        if not really:
            return
        if self.link and self.hosts[S].state is not State.PROMOTED:
            self.mail.clear()
            self.fire(S, Trigger.UNPROTECT)
            self.fire(P, Trigger.UNPROTECT)
        elif self.holder is P:
            self.fire(P, Trigger.UNPROTECT)

    @rule(really=RARE)
    def switch_over(self, really: bool) -> None:
        """The primary gives up the right to speak, and says so."""
        if really and self.hosts[P].state in (State.LOCKSTEP, State.CHECKPOINTING) and P not in self.asked:
            self.fire(P, Trigger.LEASE_LOST)

    # ---- the engine ------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.hosts[S].state is not State.PROMOTED)
    @rule()
    def suspended(self) -> None:
        self.touched |= self.fire(P, Trigger.SUSPENDED)

    @precondition(lambda self: self.hosts[S].state is not State.PROMOTED)
    @rule()
    def committed(self) -> None:
        if self.hosts[P].state is State.CHECKPOINTING and self.fire(P, Trigger.COMMITTED):
            self.unproven = self.touched = False
            if self.holder is P and P not in self.asked:
                self.holder = None

    @precondition(lambda self: self.hosts[S].state is not State.PROMOTED)
    @rule(deliver=st.booleans())
    def checkpoint(self, deliver: bool) -> None:
        self.suspended()
        self.committed()
        while deliver and self.link and self.mail:
            self.delivered()

    @rule(role=st.sampled_from(Role), really=RARE)
    def failed(self, role: Role, really: bool) -> None:
        if really:
            self.fire(role, Trigger.FAILED)

    # ---- messages --------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.link and self.mail)
    @rule()
    def delivered(self) -> None:
        pair = self.hosts[S]
        match self.mail.pop(0):
            case State.SYNCING:
                self.fire(S, Trigger.PROTECT)
            case State.CHECKPOINTING:
                self.fire(S, Trigger.SUSPENDED)
            case State.LOCKSTEP:
                self.fire(S, Trigger.COMMITTED if pair.state is State.CHECKPOINTING else Trigger.SYNCED)
            case State.HALTED:
                self.lost(S)
            case State.PASSTHROUGH:
                self.fire(S, Trigger.REFUSED)
            case State.UNPROTECTED:
                self.fire(S, Trigger.UNPROTECT)

    @rule()
    def cut(self) -> None:
        self.link = False
        self.mail.clear()

    @precondition(lambda self: not self.link)
    @rule(really=RARE)
    def mend(self, really: bool) -> None:
        """Each side hears the other's state first of all; while the arbiter is asked, its word counts."""
        if not really:
            return
        self.link = True
        state = self.hosts[P].state
        if S not in self.asked:
            if state not in (State.LOCKSTEP, State.CHECKPOINTING):
                self.fire(S, Trigger.REFUSED)
            self.fire(S, Trigger.PEER_BACK)
        if P not in self.asked:
            self.fire(P, Trigger.PEER_BACK)

    # ---- the arbiter -----------------------------------------------------------------------------------------------

    def lost(self, role: Role) -> None:
        self.fire(role, Trigger.PEER_LOST)
        if self.hosts[role].alone_pending:
            self.asked.add(role)

    @rule(role=st.sampled_from(Role))
    def peer_lost(self, role: Role) -> None:
        """A host may take the other for lost although it is not."""
        self.lost(role)

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def answered(self, data: st.DataObject) -> None:
        role = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(role)
        if self.holder in (None, role):
            self.holder = role
            if not self.fire(role, Trigger.GRANTED) and self.hosts[role].state is State.LOCKSTEP:
                self.holder = None  # it was asked for nothing
        else:
            self.fire(role, Trigger.REFUSED)

    @precondition(lambda self: self.asked)
    @rule(data=st.data(), really=RARE)
    def no_answer(self, data: st.DataObject, really: bool) -> None:
        if not really:
            return
        role = data.draw(st.sampled_from(sorted(self.asked)))
        self.asked.discard(role)
        self.fire(role, Trigger.REFUSED)

    @rule(role=st.sampled_from(Role))
    def lease_lost(self, role: Role) -> None:
        if self.holder is role:
            self.fire(role, Trigger.LEASE_LOST)


TwoHosts.TestCase.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)
TestTwoHosts = TwoHosts.TestCase
