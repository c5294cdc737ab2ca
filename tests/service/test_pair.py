"""The life of a pair on both hosts, with the real supervisors on either end of a link."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from coloebpf.control import PairState
from coloebpf.errors import ArbiterError, EngineError, PairError
from coloebpf.model import Role, State
from coloebpf.service.arbiters.base import Grant, Refusal
from coloebpf.service.engine import Ready, Replacing
from coloebpf.service.engines.model import Step
from coloebpf.service.peer.messages import Committed, Message, PairNote, Prepare, Prepared, StateNote
from tests.service.pair_world import (
    CHECKPOINTING,
    HALTED,
    LOCKSTEP,
    PASSTHROUGH,
    PROMOTED,
    SYNCING,
    UNPROTECTED,
    P,
    S,
    StoryEngine,
    World,
    play,
)

FAR_NS = 10**12  # in the future of every test


def ahead() -> int:
    """A deadline that no test reaches."""
    return time.monotonic_ns() + FAR_NS


# ---- the beginning -------------------------------------------------------------------------------------------------


def test_a_protection_begins() -> None:
    async def test(world: World) -> None:
        await world.protected()
        assert world.arbiter.begun == 1
        assert world.s.witness.granting
        steps = [step for step in world.story if "deadline" not in step]
        assert steps[:4] == ["p syncing", "s syncing", "p request", "p suspend"]
        assert sorted(steps[4:6]) == ["p commit", "s clear"]  # the secondary hears of it while the engine goes on
        assert steps[6:] == ["s settle", "s lockstep"]
        assert world.primary.ledger.commits == {"initial": 1}

    play(test)


def test_the_careful_order_at_the_beginning() -> None:
    async def test(world: World) -> None:
        await world.protected()
        steps = [step for step in world.story if "deadline" not in step]
        assert steps == [
            "p syncing",
            "s syncing",
            "s clear",
            "p request",
            "p suspend",
            "p commit",
            "s settle",
            "s lockstep",
        ]

    play(test, careful=True)


def test_the_secondary_may_come_later() -> None:
    async def test(world: World) -> None:
        await world.p.pair.start()
        await world.primary.protect()
        await world.settle()
        assert world.story == ["p syncing"]
        await world.s.pair.start()
        world.connect()
        await world.states(LOCKSTEP, LOCKSTEP)

    play(test)


def test_without_the_secondarys_leave_there_is_no_lock_step() -> None:
    async def test(world: World) -> None:
        await world.begin()
        await world.states(SYNCING, SYNCING)
        await world.settle()
        assert world.arbiter.begun == 0
        until = ahead()
        world.primary.lease(until)
        assert world.p.plane.deadline_ns == 0, "it may speak as it likes while nobody else can"
        world.primary.consider()
        await world.states(LOCKSTEP, LOCKSTEP)
        order = [step for step in world.story if step in (f"p deadline {until}", "p suspend")]
        assert order == [f"p deadline {until}", "p suspend"], "no lock-step without a deadline"
        world.primary.lease(until + 5)
        assert world.p.plane.deadline_ns == until + 5

    play(test, leased=True)


def test_an_arbiter_that_does_not_answer_at_the_beginning() -> None:
    async def test(world: World) -> None:
        world.arbiter.begin_errors.append(ArbiterError("no quorum"))
        await world.protected()
        assert world.arbiter.begun == 1

    play(test)


def test_the_first_commit_is_told_again_if_the_link_lost_it() -> None:
    async def test(world: World) -> None:
        world.lose = lambda message: isinstance(message, Committed)
        await world.begin()
        await world.states(LOCKSTEP, SYNCING)
        world.lose = lambda message: False
        world.disconnect()
        world.connect()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.arbiter.asked == []

    play(test)


def test_a_first_copy_that_fails_for_good() -> None:
    async def test(world: World) -> None:
        await world.begin_first_copy()
        world.p.engine.die()
        await world.states(UNPROTECTED, UNPROTECTED)

    play(test)


@pytest.mark.parametrize("protected", [False, True])
def test_a_copy_before_the_secondary_is_ready_counts_for_nothing(protected: bool) -> None:
    async def test(world: World) -> None:
        from coloebpf.service.engine import Committed as Whole
        from coloebpf.service.engine import Suspended

        await world.p.pair.start()
        if protected:
            await world.primary.protect()
        world.primary.engine_event(Suspended(requested=False))
        world.primary.engine_event(Whole())
        assert world.p.state is (SYNCING if protected else UNPROTECTED), "nothing is held for nobody"
        await world.s.pair.start()
        world.connect()
        if not protected:
            await world.primary.protect()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.p.engine.requests == 1

    play(test, careful=True)


def test_a_first_copy_that_takes_long() -> None:
    async def test(world: World) -> None:
        await world.begin_first_copy()
        await asyncio.sleep(0.15)  # longer than any later one may take
        world.p.engine.go()
        await world.states(LOCKSTEP, LOCKSTEP)

    play(test, commit_timeout_ms=100)


def test_a_first_copy_that_fails_is_made_again() -> None:
    async def test(world: World) -> None:
        world.p.engine.fail(Step.REQUEST)
        await world.protected()
        assert world.primary.ledger.failures == 1
        assert "p unprotected" not in world.story

    play(test)


def test_a_secondary_that_was_a_replica_and_is_none() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.disconnect()
        world.s.plane.set_state(3, SYNCING)
        await world.restart(S)
        world.connect()
        await world.states(PASSTHROUGH, HALTED)

    play(test)


# ---- checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("careful", "steps"),
    [
        (False, ["p request", "p suspend", "s checkpointing", "s clear", "p commit", "s settle", "s lockstep"]),
        (
            True,
            [
                "p checkpointing",
                "s checkpointing",
                "s clear",
                "p request",
                "p suspend",
                "p commit",
                "s settle",
                "s lockstep",
            ],
        ),
    ],
)
def test_a_checkpoint_for_a_divergence(careful: bool, steps: list[str]) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.story.clear()
        world.find()
        await world.until(lambda: world.primary.ledger.commits.get("divergence") == 1)
        await world.states(LOCKSTEP, LOCKSTEP)
        # Without the careful order the secondary hears of each step while the engine goes on.
        got = [step for step in world.story if "deadline" not in step]
        assert sorted(got) == sorted(steps)
        for first, then in pairwise(steps):
            if careful or first[0] == then[0]:
                assert got.index(first) < got.index(then)
        assert world.primary.ledger.last is not None
        assert world.primary.ledger.last.wish.reason == "1 flows differ (payload)"

    play(test, careful=careful)


def test_one_request_until_the_commit() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.p.engine.hang()
        for _ in range(5):
            world.find()
        await world.states(CHECKPOINTING, CHECKPOINTING)
        for _ in range(5):
            world.find("timeout", "missing_on_svm")
        await world.settle()
        assert world.p.engine.requests == 2
        world.p.engine.go()
        await world.states(LOCKSTEP, LOCKSTEP)
        await world.settle()
        assert world.p.engine.requests == 2, "the commit has settled what was found meanwhile"

    play(test)


def test_what_was_found_before_the_last_commit_asks_for_nothing() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.find(epoch=world.p.plane.word.epoch - 1)
        await world.settle()
        assert world.p.engine.requests == 1

    play(test)


def test_an_operators_checkpoint() -> None:
    async def test(world: World) -> None:
        await world.protected()
        await world.primary.checkpoint()
        assert world.primary.ledger.commits == {"initial": 1, "operator": 1}
        world.p.engine.fail()
        with pytest.raises(PairError, match="told to fail"):
            await world.primary.checkpoint()
        with pytest.raises(PairError, match="ask there"):
            await world.secondary.checkpoint()

    play(test)


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("step", Step)
def test_a_checkpoint_that_fails_is_made_again(careful: bool, step: Step) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.p.engine.fail(step, times=2)
        world.story.clear()
        world.find()
        await world.until(lambda: world.primary.ledger.commits.get("divergence") == 1)
        assert world.primary.ledger.failures == 2
        first = world.story.index("p commit")
        assert world.story[:first].count("p request") == 3
        assert "p lockstep" not in world.story, "only a commit leads back"

    play(test, careful=careful)


def test_a_secondary_that_does_not_prepare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coloebpf.service.asking.PREPARE_S", 0.02)

    async def test(world: World) -> None:
        await world.protected()
        lost: list[Message] = []

        def lose(message: Message) -> bool:
            if isinstance(message, Prepare) and len(lost) < 2:
                lost.append(message)
                return True
            return False

        world.lose = lose
        world.story.clear()
        world.find()
        await world.until(lambda: world.primary.ledger.commits.get("divergence") == 1)
        assert world.story.index("p checkpointing") < world.story.index("s clear") < world.story.index("p request")
        assert world.primary.ledger.failures == 2

    play(test, careful=True)


def test_a_late_answer_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coloebpf.service.asking.PREPARE_S", 0.02)

    async def test(world: World) -> None:
        await world.protected()
        world.lose = lambda message: isinstance(message, Prepare)
        world.find()
        await world.until(lambda: world.primary.ledger.failures > 0)
        world.primary.received(Prepared(3, 1))  # of the first checkpoint
        await world.settle()
        assert world.p.engine.requests == 1

    play(test, careful=True)


def test_a_checkpoint_of_the_engines_own() -> None:
    async def test(world: World) -> None:
        from coloebpf.service.engine import Committed as Whole
        from coloebpf.service.engine import Suspended

        await world.protected()
        world.story.clear()
        world.primary.engine_event(Suspended(requested=False))
        world.primary.engine_event(Whole())
        await world.states(LOCKSTEP, LOCKSTEP)
        await world.settle()
        assert {"p suspend", "p commit", "s clear"} <= set(world.story)
        assert world.primary.ledger.commits["interval"] == 1

    play(test, careful=True)


def test_an_engine_that_says_when_the_svm_is_touched() -> None:
    """Nothing proves anything from then on, and the PVM, which runs, is in no new epoch before it stands still."""

    async def test(world: World) -> None:
        from coloebpf.service.engine import Committed as Whole
        from coloebpf.service.engine import Overwriting, Suspended

        await world.protected()
        world.story.clear()
        before = world.p.plane.state(0)
        world.primary.engine_event(Overwriting(requested=False))
        assert world.p.plane.state(0) == PairState(CHECKPOINTING, before.epoch)
        assert world.primary.ledger.pending is not None, "it would never be overdue"
        world.secondary.engine_event(Replacing())
        assert world.story[-2:] == ["s checkpointing", "s clear"]
        world.primary.engine_event(Suspended(requested=False))
        world.primary.engine_event(Whole())
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.p.plane.state(0) == PairState(LOCKSTEP, before.epoch + 1)
        assert world.story.count("s clear") == 1

    play(test)


def test_a_storm_and_the_calm_after_it() -> None:
    async def test(world: World) -> None:
        await world.protected()
        for number in range(1, 4):
            world.find()
            await world.until(lambda n=number: world.primary.ledger.commits.get("divergence") == n)  # type: ignore[misc]
        world.find()
        assert world.primary.ledger.mode == "periodic"
        assert world.primary.ledger.mode_reason == "3 requests within 2000 ms"
        await world.until(lambda: world.primary.ledger.commits.get("periodic", 0) >= 3)
        await world.until(lambda: world.primary.ledger.mode == "lockstep")

    play(test, storm_count=3, calm_ms=100, interval_max_ms=300)


def test_little_room_asks_for_a_checkpoint() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.primary.room_is_low()
        await world.until(lambda: world.primary.ledger.commits.get("high_water") == 1)

    play(test)


def test_a_reload_changes_the_times() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.primary.reconfigure(replace(world.primary.config, interval_max_ms=10))
        await world.until(lambda: world.primary.ledger.commits.get("interval", 0) >= 2)

    play(test)


# ---- the secondary is gone -----------------------------------------------------------------------------------------


def gone(world: World) -> None:
    world.p.engine.lose_secondary()


def hangs(world: World) -> None:
    world.p.engine.hang()
    world.find()


def dies(world: World) -> None:
    world.p.engine.die()


def svm_dies(world: World) -> None:
    world.s.engine.lose_domain()


@pytest.mark.parametrize("how", [gone, hangs, dies, svm_dies])
@pytest.mark.parametrize("leased", [False, True])
def test_a_living_host_without_its_svm(how: Callable[[World], None], leased: bool) -> None:
    """Its service's word is certainty enough: no arbiter, and no host turned off."""

    async def test(world: World) -> None:
        await world.protected()
        how(world)
        await world.states(PASSTHROUGH, HALTED)
        assert world.arbiter.asked == []
        assert "p kick" in world.story, "what was held leaves"
        assert world.p.plane.deadline_ns == 0
        assert not world.s.witness.granting

    play(test, leased=leased, commit_timeout_ms=100)


@pytest.mark.parametrize(("answer", "state"), [(Grant(), PASSTHROUGH), (Refusal("the other one has it"), HALTED)])
def test_the_svm_and_the_link_are_gone(answer: Grant | Refusal, state: State) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.disconnect()
        world.p.engine.lose_secondary()
        await world.until(lambda: world.arbiter.asked == [P])
        await world.settle()
        assert world.p.state is LOCKSTEP, "it holds until there is an answer"
        world.arbiter.answers[P].put_nowait(answer)
        await world.states(state, LOCKSTEP)

    play(test)


def test_a_secondary_that_hears_and_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coloebpf.service.parting.DISMISS_S", 0.02)

    async def test(world: World) -> None:
        await world.protected()
        world.lose = lambda message: isinstance(message, StateNote)
        world.p.engine.lose_secondary()
        await world.until(lambda: world.arbiter.asked == [P])

    play(test)


def test_protected_again() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.p.engine.lose_secondary()
        await world.states(PASSTHROUGH, HALTED)
        await world.settle()
        await world.primary.protect()
        world.primary.consider()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.arbiter.begun == 2

    play(test)


def test_a_host_that_is_alone_makes_its_right_last_before_its_service_ends() -> None:
    async def test(world: World) -> None:
        await world.protected()
        await world.primary.rest(5)
        assert world.arbiter.rested == []  # it speaks by the secondary's leave, which is farewell.py's
        world.part()
        world.arbiter.answers[P].put_nowait(Grant(ahead()))
        world.arbiter.answers[S].put_nowait(Refusal("alone a"))
        await world.states(PASSTHROUGH, HALTED)
        long = ahead() + 10**9
        world.arbiter.answers[P].put_nowait(Grant(long))
        await world.primary.rest(5)
        assert world.arbiter.rested == [5]
        assert world.p.plane.deadline_ns == long

    play(test, leased=True)


# ---- the hosts have lost each other --------------------------------------------------------------------------------


@pytest.mark.parametrize("during", [None, *Step])
def test_the_primary_goes_on_alone(during: Step | None) -> None:
    async def test(world: World) -> None:
        await world.protected()
        if during is not None:
            world.p.engine.hang(during)
            world.find()
            await world.until(lambda: world.p.engine.requests == 2)
            await world.settle()
        before = world.p.state
        world.part()
        await world.until(lambda: sorted(world.arbiter.asked) == [P, S])
        await world.settle()
        assert world.p.state is before, "it holds"
        assert world.s.state in (LOCKSTEP, CHECKPOINTING)
        until = ahead()
        world.story.clear()
        world.arbiter.answers[P].put_nowait(Grant(until))
        world.arbiter.answers[S].put_nowait(Refusal("alone a"))
        await world.states(PASSTHROUGH, HALTED)
        await world.settle()
        assert [step for step in world.story if step[0] == "p"] == [
            f"p deadline {until}",
            "p passthrough",
            "p kick",
            "p failover",
        ]
        assert world.announced == []
        world.p.engine.go()
        await world.settle()
        assert world.p.state is PASSTHROUGH

    play(test)


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("during", [None, *Step])
def test_the_secondary_takes_over(careful: bool, during: Step | None) -> None:
    async def test(world: World) -> None:
        await world.protected()
        if during is not None:
            world.p.engine.hang(during)
            world.find()
            await world.until(lambda: world.p.engine.requests == 2)
            await world.settle()
        world.s.witness.safe.clear()
        world.part()
        assert not world.s.witness.granting
        until = ahead()
        world.story.clear()
        world.arbiter.answers[S].put_nowait(Grant(until))
        world.arbiter.answers[P].put_nowait(Refusal("alone b"))
        await world.until(lambda: world.s.witness.waited == 1)
        await world.settle()
        assert world.s.state in (LOCKSTEP, CHECKPOINTING), "the primary may still be speaking"
        world.s.witness.safe.set()
        world.touch()
        await world.states(HALTED, PROMOTED)
        assert [step for step in world.story if step[0] == "s"] == ["s failover", f"s deadline {until}", "s promoted"]
        assert world.announced == ["web"]

    play(test, careful=careful, leased=True)


def test_a_secondary_that_is_lost_during_the_first_copy() -> None:
    """Its loss is told once, while it was no replica; lock-step would hold for nobody, and for ever."""

    async def test(world: World) -> None:
        await world.begin_first_copy()
        world.p.witness.lost = True
        world.lose = lambda message: True  # the link has not noticed yet
        world.p.pair.peer_lost()
        await world.settle()
        assert world.arbiter.asked == [], "it holds nothing yet"
        world.p.engine.go()
        await world.until(lambda: world.arbiter.asked == [P])
        world.arbiter.answers[P].put_nowait(Grant())
        await world.states(PASSTHROUGH, SYNCING)

    play(test)


def test_a_first_copy_does_not_become_a_replica_while_there_is_no_link() -> None:
    """The secondary may be another one when it is back; meanwhile nothing is held, and nobody is asked."""

    async def test(world: World) -> None:
        await world.begin_first_copy()
        world.part()
        world.p.engine.go()
        await world.settle()
        assert world.primary.ledger.pending is None
        assert (world.p.state, world.s.state, world.arbiter.asked) == (SYNCING, SYNCING, [])
        world.connect()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.arbiter.begun == 2

    play(test)


def test_a_question_is_not_taken_back() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.part()
        await world.until(lambda: sorted(world.arbiter.asked) == [P, S])
        world.connect()
        for side in world.sides.values():
            side.pair.peer_back()
        assert world.p.pair.machine.alone_pending
        assert world.s.pair.machine.alone_pending
        assert not world.s.witness.granting
        world.arbiter.answers[P].put_nowait(Grant())
        world.arbiter.answers[S].put_nowait(Refusal("alone a"))
        await world.states(PASSTHROUGH, HALTED)

    play(test)


@pytest.mark.parametrize("role", [P, S])
def test_a_question_that_nobody_waits_for_any_more_is_taken_back(role: Role) -> None:
    """A fencing command that goes on trying would end the only host that is well."""

    async def test(world: World) -> None:
        await world.protected()
        side = world.sides[role]
        side.pair.peer_lost()
        await world.until(lambda: world.arbiter.asked == [role])
        await side.pair.unprotect() if role is P else side.pair.received(StateNote(3, PASSTHROUGH, 2))
        state = side.state
        assert state is (UNPROTECTED if role is P else HALTED)
        await world.settle()
        world.arbiter.answers[role].put_nowait(Grant(ahead()))
        await world.settle()
        assert world.arbiter.answers[role].qsize() == 1, "nobody is listening"
        assert side.state is state

    play(test)


@pytest.mark.parametrize("leaves", [P, S])
def test_a_right_that_is_not_renewed_ends(leaves: object) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.part()
        soon = time.monotonic_ns() + 10**7
        for role in (P, S):
            world.arbiter.answers[role].put_nowait(Grant(soon) if role is leaves else Refusal("no"))
        await world.states(*((PASSTHROUGH, HALTED) if leaves is P else (HALTED, PROMOTED)))
        world.arbiter.answers[leaves].put_nowait(Grant(soon + 10**7))  # type: ignore[index]
        side = world.p if leaves is P else world.s
        world.arbiter.answers[leaves].put_nowait(Refusal("you were gone for too long"))  # type: ignore[index]
        await world.states(HALTED, HALTED)
        assert side.plane.deadline_ns == soon + 10**7

    play(test)


def test_without_an_arbiter_the_primary_goes_on_and_the_secondary_waits() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.arbiter.answers[P].put_nowait(Grant())
        world.part()
        await world.states(PASSTHROUGH, LOCKSTEP)
        await world.settle()
        assert world.arbiter.asked == [P]
        world.connect()
        await world.states(PASSTHROUGH, HALTED)

    play(test, promotes=False)


def test_without_an_arbiter_an_operator_decides() -> None:
    async def test(world: World) -> None:
        await world.protected()
        with pytest.raises(PairError, match="the primary is there"):
            await world.secondary.failover()
        world.disconnect()
        world.s.pair.peer_lost()
        await world.secondary.failover()
        await world.states(LOCKSTEP, PROMOTED)
        world.connect()
        await world.states(HALTED, PROMOTED)

    play(test, promotes=False)


def test_a_blip_without_an_arbiter_leaves_a_secondary_in_lock_step() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.s.pair.peer_lost()
        assert not world.s.witness.granting
        world.s.pair.peer_back()
        assert world.s.witness.granting
        with pytest.raises(PairError):
            await world.secondary.failover()

    play(test, promotes=False)


@pytest.mark.parametrize("role", [P, S])
def test_while_the_arbiter_does_not_answer_an_operators_word_counts(role: object) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.part()
        await world.until(lambda: sorted(world.arbiter.asked) == [P, S])
        await (world.primary if role is P else world.secondary).failover()
        await world.states(*((PASSTHROUGH, LOCKSTEP) if role is P else (LOCKSTEP, PROMOTED)))
        world.arbiter.answers[role].put_nowait(Refusal("too late"))  # type: ignore[index]
        await world.settle()
        assert world.p.state is (PASSTHROUGH if role is P else LOCKSTEP)

    play(test, leased=True)


@pytest.mark.parametrize("promotes", [True, False])
def test_a_halted_primary_goes_on_only_if_the_guest_runs_nowhere_else(promotes: bool) -> None:
    async def test(world: World) -> None:
        await world.protected()
        await world.primary.failover()
        await world.states(HALTED, PROMOTED)
        await world.settle()
        with pytest.raises(PairError, match=r"may run on the other host$"):
            await world.primary.unprotect()
        world.disconnect()
        with pytest.raises(PairError, match="if it is off, say `failover` here"):
            await world.primary.unprotect()
        await world.primary.failover()
        assert world.p.state is UNPROTECTED
        assert world.p.plane.deadline_ns == 0

    play(test, promotes=promotes)


@pytest.mark.parametrize("role", [P, S])
@pytest.mark.parametrize("promotes", [True, False])
@pytest.mark.parametrize("linked", [True, False])
def test_a_hand_over_is_never_a_word_that_the_other_host_is_gone(role: Role, promotes: bool, linked: bool) -> None:
    """Nor is anything handed to a host that is being fenced."""

    async def test(world: World) -> None:
        await world.protected()
        host = world.primary if role is P else world.secondary
        if not linked:
            world.disconnect()
        host.peer_lost()
        with pytest.raises(PairError):
            await host.handover()
        await world.settle()
        assert (world.p.state, world.s.state) == (LOCKSTEP, LOCKSTEP), "both wait, nobody has answered"

    play(test, promotes=promotes)


def test_a_host_that_has_handed_over_stays_silent() -> None:
    async def test(world: World) -> None:
        await world.protected()
        await world.primary.handover()
        await world.states(HALTED, PROMOTED)
        world.disconnect()
        for host in (world.primary, world.secondary):
            with pytest.raises(PairError):
                await host.handover()
        await world.states(HALTED, PROMOTED)

    play(test)


@pytest.mark.parametrize("order", ["failover", "handover"])
def test_an_engine_that_can_not_hand_over_says_what_to_do(order: str) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.p.engine.hands_over = "end the guest here"
        with pytest.raises(PairError, match="engine model can't: end the guest here"):
            await getattr(world.primary, order)()
        await world.settle()
        assert (world.p.state, world.s.state) == (LOCKSTEP, LOCKSTEP)

    play(test)


# ---- the guest is gone, or moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("promotes", "leased"), [(True, True), (True, False), (False, False)])
@pytest.mark.parametrize("by_operator", [True, False])
def test_the_primary_gives_up_its_right(promotes: bool, leased: bool, by_operator: bool) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.story.clear()
        world.s.witness.safe.clear()  # the primary's word is enough
        if leased:
            world.arbiter.answers[S].put_nowait(Grant())
        if by_operator:
            await world.primary.failover()
        else:
            world.p.engine.lose_domain()
        await world.states(HALTED, PROMOTED)
        steps = [step for step in world.story if "deadline" not in step]
        assert steps == ["p halted", "s failover", "s promoted"]
        assert world.arbiter.asked == ([S] if leased else [])  # a fencing command would end a host that is well

    play(test, promotes=promotes, leased=leased)


def test_an_old_halt_is_no_offer() -> None:
    """What is heard only after a cut may have been said after the primary was alone."""

    async def test(world: World) -> None:
        await world.protected()
        world.arbiter.answers[P].put_nowait(Grant())
        world.disconnect()
        world.p.pair.peer_lost()
        await world.states(PASSTHROUGH, LOCKSTEP)
        world.p.engine.lose_domain()
        await world.states(HALTED, LOCKSTEP)
        world.connect()
        await world.settle()
        assert world.s.state is LOCKSTEP
        assert world.arbiter.asked == [P]

    play(test)


@pytest.mark.parametrize("by_operator", [True, False])
def test_an_offer_that_could_not_be_sent_is_made_when_the_link_is_back(by_operator: bool) -> None:
    """The primary was never alone: the secondary is as good a guest as it was."""

    async def test(world: World) -> None:
        await world.protected()
        world.link = False  # and nobody has noticed
        if by_operator:
            with pytest.raises(PairError, match="could not be told"):
                await world.primary.failover()
        else:
            world.p.engine.lose_domain()
        world.disconnect()
        await world.settle()
        assert (world.p.state, world.s.state) == (HALTED, LOCKSTEP)
        world.connect()
        await world.states(HALTED, PROMOTED)

    play(test, promotes=False)


def test_nothing_to_move_to() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.disconnect()
        with pytest.raises(PairError, match="no secondary"):
            await world.primary.failover()
        assert world.p.state is LOCKSTEP

    play(test)


def test_an_svm_that_can_not_become_the_guest() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.s.engine.die()
        world.arbiter.answers[S].put_nowait(Grant())
        world.disconnect()
        world.s.pair.peer_lost()
        await world.states(LOCKSTEP, HALTED)
        assert world.announced == []

    play(test)


# ---- the end -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("careful", [False, True])
def test_a_protection_ends(careful: bool) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.story.clear()
        await world.primary.unprotect()
        await world.states(UNPROTECTED, UNPROTECTED)
        assert world.story.index("s syncing") < world.story.index("p passthrough"), "first it is no replica any more"
        last = [step for step in world.story if step[0] == "p" and "deadline" not in step][-3:]
        assert last == ["p passthrough", "p kick", "p unprotected"], "what is held leaves, proven or not"
        assert world.p.plane.deadline_ns == 0
        with pytest.raises(PairError, match="no protection"):
            await world.primary.unprotect()
        await world.primary.protect()
        await world.states(LOCKSTEP, LOCKSTEP)

    play(test, careful=careful)


def test_a_commit_that_comes_too_late_makes_no_replica() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.p.engine.hang()
        world.find()
        await world.states(CHECKPOINTING, CHECKPOINTING)

        async def release(pair: object) -> Grant:
            world.story.append("released")
            world.p.engine.go()
            await world.settle()
            assert world.p.engine.commits == 2
            return Grant()

        world.arbiter.release = release  # type: ignore[method-assign]
        await world.primary.unprotect()
        await world.states(UNPROTECTED, UNPROTECTED)
        assert "s lockstep" not in world.story[world.story.index("released") :]

    play(test)


@pytest.mark.parametrize(
    ("leased", "promotes", "answer", "error"),
    [
        (False, True, Grant(), "might take over"),
        (True, True, Refusal("alone b"), "may run on the other host"),
        (True, True, ArbiterError("no quorum"), "no quorum"),
        (True, True, Grant(), None),
        (False, False, Grant(), None),
    ],
)
def test_a_protection_ends_without_the_secondary(
    leased: bool, promotes: bool, answer: Grant | Refusal | Exception, error: str | None
) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.disconnect()
        world.arbiter.released = answer
        if error is None:
            await world.primary.unprotect()
            assert world.p.state is UNPROTECTED
        else:
            with pytest.raises(PairError, match=error):
                await world.primary.unprotect()
            assert world.p.state is LOCKSTEP
            world.connect()
            await world.primary.checkpoint()

    play(test, leased=leased, promotes=promotes)


def test_the_secondarys_end_leaves_the_primary_alone() -> None:
    async def test(world: World) -> None:
        await world.protected()
        await world.secondary.unprotect()
        await world.states(PASSTHROUGH, UNPROTECTED)
        assert world.arbiter.asked == []
        with pytest.raises(PairError, match="ask there"):
            await world.secondary.protect()

    play(test)


# ---- the service ends and comes back -------------------------------------------------------------------------------


@pytest.mark.parametrize("role", [P, S])
def test_a_restart_in_lock_step(role: object) -> None:
    async def test(world: World) -> None:
        await world.protected()
        epoch = world.p.plane.word.epoch
        world.story.clear()
        await world.restart(role)  # type: ignore[arg-type]
        world.connect()
        await world.settle()
        assert (world.p.state, world.s.state) == (LOCKSTEP, LOCKSTEP)
        assert [step for step in world.story if "deadline" not in step] == [], "nothing was touched"
        assert world.p.plane.word.epoch == epoch
        assert world.s.witness.granting
        world.find()
        await world.until(lambda: world.primary.ledger.commits.get("divergence") == 1)

    play(test)


@pytest.mark.parametrize("careful", [False, True])
def test_a_restart_in_a_checkpoint(careful: bool) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.p.engine.hang()
        world.find()
        await world.states(CHECKPOINTING, CHECKPOINTING)
        await world.settle()
        await world.restart(P)
        assert world.p.state is CHECKPOINTING, "nothing is released before a commit"
        world.connect()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.p.engine.commits == 1

    play(test, careful=careful)


@pytest.mark.parametrize(
    ("guest", "states"),
    [(True, (PASSTHROUGH, HALTED)), (False, (HALTED, PROMOTED)), (EngineError("no toolstack"), (PASSTHROUGH, HALTED))],
)
def test_an_engine_that_does_not_come_back_after_a_restart(
    guest: bool | EngineError, states: tuple[State, State]
) -> None:
    """Nothing could be asked of it, so what differs would wait for ever."""

    async def test(world: World) -> None:
        await world.protected()
        world.comes_back, world.guest = False, guest
        await world.restart(P)
        world.connect()
        await world.settle()
        assert (world.p.state, world.s.state) == (LOCKSTEP, LOCKSTEP), "it may take its time"
        await world.states(*states)
        assert world.arbiter.asked == []

    play(test, commit_timeout_ms=100, promotes=False)


def test_an_engine_that_can_not_ask_for_its_guest_keeps_the_secondary(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The PVM may be gone, and then the SVM is all that is left of the guest."""
    monkeypatch.setattr("tests.service.pair_world.AskingEngine", StoryEngine)

    async def test(world: World) -> None:
        await world.protected()
        world.comes_back = False
        await world.restart(P)
        world.connect()
        await asyncio.sleep(0.15)
        assert (world.p.state, world.s.state) == (LOCKSTEP, LOCKSTEP)
        assert "nobody can ask for checkpoints" in caplog.text

    play(test, commit_timeout_ms=100)


def test_an_engine_that_comes_back_late_after_a_restart() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.comes_back = False
        await world.restart(P)
        world.connect()
        world.primary.engine_event(Ready())
        await asyncio.sleep(0.15)
        assert (world.p.state, world.s.state) == (LOCKSTEP, LOCKSTEP)

    play(test, commit_timeout_ms=100)


def test_a_restart_where_everything_may_have_passed_meanwhile() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.story.clear()
        await world.restart(P)
        assert world.p.state is CHECKPOINTING
        assert world.p.plane.open_after_ns > time.monotonic_ns()
        world.connect()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.story.index("p checkpointing") < world.story.index("p commit")
        assert world.primary.ledger.commits == {"initial": 1}

    play(test, on_service_loss="open", promotes=False)


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("during", [None, *Step])
def test_a_service_that_stood_still_while_everything_passed(during: Step | None, careful: bool) -> None:
    """What was copied, or asked for, before it woke up does not have what the client was sent meanwhile."""

    async def test(world: World) -> None:
        await world.protected()
        if during is not None:
            world.p.engine.hang(during)
            world.find()
            await world.until(lambda: world.p.engine.requests == 2)
            await world.settle()
        world.story.clear()
        held: list[State] = []
        old = world.p.plane.open_after_ns
        world.p.plane.set_open_after = lambda pair, ns: held.append(world.p.plane.word.state)  # type: ignore[method-assign]
        world.primary.tick()
        assert held.pop() is world.p.state, "no other state as long as it is in time"
        world.primary.open_after_ns = old - 10**12
        world.primary.tick()
        assert held == [CHECKPOINTING], "they hold before they compare again"
        world.p.engine.go()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.p.engine.requests == (2 if during is None else 3)
        assert world.story.count("p commit") == 1
        assert max(i for i, step in enumerate(world.story) if step == "p request") < world.story.index("p commit")

    play(test, on_service_loss="open", careful=careful)


def test_a_restart_before_the_first_commit() -> None:
    async def test(world: World) -> None:
        await world.begin(hang=Step.SUSPENDED)
        await world.states(CHECKPOINTING, SYNCING)
        await world.restart(P)
        world.connect()
        await world.states(LOCKSTEP, LOCKSTEP)

    play(test)


@pytest.mark.parametrize(("answer", "state"), [(Grant(), PROMOTED), (Refusal("alone a"), HALTED)])
def test_a_restart_of_who_is_alone(answer: Grant | Refusal, state: State) -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.part()
        world.arbiter.answers[S].put_nowait(Grant(ahead()))
        world.arbiter.answers[P].put_nowait(Refusal("no"))
        await world.states(HALTED, PROMOTED)
        await world.restart(S)
        world.arbiter.answers[S].put_nowait(answer)
        await world.settle()
        await world.states(HALTED, state)
        if state is PROMOTED:
            assert world.s.plane.deadline_ns > time.monotonic_ns()

    play(test, leased=True)


def test_roles_that_were_exchanged() -> None:
    """After a takeover the file calls the secondary primary: it is still alone with the guest."""

    async def test(world: World) -> None:
        world.p.plane.set_state(3, PROMOTED)
        world.s.plane.set_state(3, PASSTHROUGH)
        for side in world.sides.values():
            await side.pair.start()
        assert (world.p.state, world.s.state) == (PASSTHROUGH, HALTED)
        world.connect()
        await world.primary.protect()
        await world.states(LOCKSTEP, LOCKSTEP)

    play(test)


@pytest.mark.parametrize("promotes", [False, True])
def test_a_primary_that_remembers_nothing(promotes: bool) -> None:
    """Its host was started again: the secondary has all that is left of the guest."""

    async def test(world: World) -> None:
        await world.protected()
        world.disconnect()
        world.p.plane.set_state(3, UNPROTECTED)
        await world.restart(P)
        world.connect()
        await world.settle()
        assert (world.p.state, world.s.state) == (UNPROTECTED, LOCKSTEP)
        if promotes:
            world.arbiter.answers[S].put_nowait(Grant())
        await world.secondary.failover()
        await world.states(HALTED, PROMOTED)
        with pytest.raises(PairError, match="unprotect it first"):
            await world.primary.protect()

    play(test, promotes=promotes)


def test_an_answer_that_comes_after_the_end() -> None:
    async def test(world: World) -> None:
        await world.protected()
        world.part()
        await world.until(lambda: sorted(world.arbiter.asked) == [P, S])
        await world.primary.unprotect()
        world.arbiter.answers[P].put_nowait(Refusal("no record of this pair"))
        await world.settle()
        assert world.p.state is UNPROTECTED

    play(test, leased=True)


@pytest.mark.parametrize(("policy", "open_later"), [("hold", False), ("open", True)])
def test_what_the_programs_do_without_the_service(policy: str, open_later: bool) -> None:
    async def test(world: World) -> None:
        await world.p.pair.start()
        left = world.p.plane.open_after_ns - time.monotonic_ns()
        assert (0 < left <= 500 * 10**6) is open_later
        assert open_later or world.p.plane.open_after_ns == 0

    play(test, on_service_loss=policy, service_loss_after_ms=500)


def test_files_that_do_not_fit_each_other(caplog: pytest.LogCaptureFixture) -> None:
    async def test(world: World) -> None:
        await world.p.pair.start()
        world.p.pair.link_up(None)
        world.p.pair.link_up(PairNote(3, "web", P, LOCKSTEP, 0))
        world.p.pair.link_up(PairNote(3, "mail", S, LOCKSTEP, 0))
        assert caplog.text.count("no such pair in the other role") == 3
        assert world.p.pair.peer_state is None

    play(test)


def test_a_stopped_pair_does_nothing_more() -> None:
    async def test(world: World) -> None:
        await world.protected()
        await world.p.pair.stop()
        world.story.clear()
        await asyncio.sleep(0.05)
        assert world.story == []

    play(test, interval_max_ms=10)
