"""Connections that clients know by other numbers than the guest: kept at a change of roles, and handed on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from coloebpf.aliases import TEXT_LENGTH
from coloebpf.errors import BpfError
from coloebpf.model import Role
from coloebpf.service import pair
from coloebpf.service.arbiters.base import Protected
from coloebpf.service.engine import Committed as EngineCommitted
from coloebpf.service.engine import Suspended
from coloebpf.service.engines.model import Step
from coloebpf.service.peer.messages import ALIASES_MAX, Aliases, AliasesTaken, Committed, Message, StateNote
from tests.service.pair_world import LOCKSTEP, PASSTHROUGH, PROMOTED, SOON, SYNCING, UNPROTECTED, World, play


def entries(count: int) -> list[str]:
    return [f"{number:0{TEXT_LENGTH}x}" for number in range(count)]


async def recorded(world: World) -> None:
    """All is ready for the first checkpoint."""
    async with asyncio.timeout(SOON):
        while not world.primary._recorded:
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("count", [0, 1, ALIASES_MAX, ALIASES_MAX + 1, 3 * ALIASES_MAX])
def test_the_secondary_has_them_before_it_is_a_replica(count: int) -> None:
    async def test(world: World) -> None:
        world.p.aliases.there = entries(count)
        world.s.aliases.there = ["of an earlier protection"]
        await world.protected()
        assert world.s.aliases.there == entries(count)
        sent = [message for message in world.p.sent if isinstance(message, (Aliases, Committed))]
        parts = [message.part for message in sent if isinstance(message, Aliases)]
        assert parts == list(range(max(1, -(-count // ALIASES_MAX))))
        assert isinstance(sent[len(parts)], Committed)

    play(test)


def test_a_promoted_secondary_keeps_its_own_before_its_programs_are_exchanged() -> None:
    """P2 of a promoted pair lets nothing out, and that of one in passthrough all: by then the entries must be there."""

    async def test(world: World) -> None:
        world.p.plane.set_state(3, PROMOTED)
        world.s.plane.set_state(3, PASSTHROUGH)
        for side in world.sides.values():
            await side.pair.start()
        assert world.story[2:] == ["p keep", "p passthrough", "s halted"]

    play(test)


def test_others_keep_nothing() -> None:
    async def test(world: World) -> None:
        await world.p.pair.start()
        assert "p keep" not in world.story

    play(test)


def test_without_an_answer_the_protection_does_not_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coloebpf.service.handing.TAKE_S", 0.01)
    monkeypatch.setattr("coloebpf.service.protecting.RETRY_S", 0.01)

    async def test(world: World) -> None:
        lost: list[Message] = []

        def lose(message: Message) -> bool:
            if isinstance(message, AliasesTaken) and len(lost) < 3:
                lost.append(message)
                return True
            return False

        world.lose = lose
        world.p.aliases.there = entries(2 * ALIASES_MAX)
        await world.protected()
        assert len(lost) == 3
        assert world.s.aliases.there == entries(2 * ALIASES_MAX)

    play(test)


def test_what_is_no_entry_here_is_told_and_not_taken(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coloebpf.service.handing.TAKE_S", 0.01)

    async def test(world: World) -> None:
        def refuse(texts: object) -> None:
            raise ValueError("the pair has no NIC 2")

        monkeypatch.setattr(world.s.aliases, "take", refuse)
        await world.begin()
        await world.until(lambda: "has not taken" in caplog.text)
        assert "the pair has no NIC 2" in caplog.text
        assert world.p.state is SYNCING

    play(test)


@pytest.mark.parametrize("state", [UNPROTECTED, LOCKSTEP, PROMOTED])
def test_they_come_at_the_beginning_only(state: object) -> None:
    async def test(world: World) -> None:
        await world.protected()
        if state is not LOCKSTEP:
            world.secondary.machine.state = state  # type: ignore[assignment]
        world.s.sent.clear()
        world.secondary.received(Aliases(3, 99, 0, tuple(entries(1))))
        assert world.s.aliases.there == []
        assert world.s.sent == []

    play(test)


def test_ended_ones_are_looked_for_now_and_then() -> None:
    async def test(world: World) -> None:
        await world.protected()
        for side in world.sides.values():
            looks = side.aliases.looks
            for _ in range(100):
                side.pair.tick()
            assert side.aliases.looks == looks
            side.pair._aliases_after_ns -= pair.ALIASES_PERIOD_NS
            side.pair.tick()
            assert side.aliases.looks == looks + 1

    play(test)


def test_a_tick_looks_at_a_slice_of_them() -> None:
    async def test(world: World) -> None:
        await world.protected()
        side = world.p
        side.aliases.there = entries(300)
        for _ in range(4):
            side.pair._aliases_after_ns = 0
            side.pair.tick()
        assert side.aliases.looks == 2, "the first has four parts, and the second begins behind it"

    play(test)


def test_one_that_ends_while_they_are_handed_on_is_not_left_with_the_secondary() -> None:
    """Its client's SYN may have passed the secondary before the entry was there."""

    async def test(world: World) -> None:
        def end(message: Message) -> bool:
            if isinstance(message, AliasesTaken) and len(world.p.aliases.there) == 2:
                world.p.aliases.there = entries(1)
            return False

        world.lose = end
        world.p.aliases.there = entries(2)
        await world.protected()
        assert world.s.aliases.there == entries(1)

    play(test)


@pytest.mark.parametrize("how", ["link", "state"])
def test_a_secondary_that_begins_anew_is_told_anew(how: str) -> None:
    """Before the first commit: it may be another host by now, or have heard of another protection."""

    async def test(world: World) -> None:
        world.p.aliases.there = entries(3)
        await world.begin(hang=Step.REQUEST)
        await recorded(world)
        world.s.aliases.there = []
        if how == "link":
            world.disconnect()
            world.connect()
        else:
            world.primary.received(StateNote(3, UNPROTECTED, 0))
            world.primary.received(StateNote(3, SYNCING, 0))
        assert not world.primary._recorded
        await recorded(world)
        assert world.s.aliases.there == entries(3)

    play(test)


def test_a_link_that_is_lost_behind_the_handing_counts_too() -> None:
    """The arbiter may take its time."""

    async def test(world: World) -> None:
        begun, go_on = asyncio.Event(), asyncio.Event()
        first = world.arbiter.begin

        async def begin(pair: Protected) -> None:
            begun.set()
            await go_on.wait()
            await first(pair)

        world.arbiter.begin = begin  # type: ignore[method-assign]
        world.p.aliases.there = entries(3)
        await world.begin()
        await begun.wait()
        world.s.aliases.there = []
        world.disconnect()
        world.connect()
        go_on.set()
        await world.states(LOCKSTEP, LOCKSTEP)
        assert world.s.aliases.there == entries(3)

    play(test)


def test_a_checkpoint_that_begins_while_the_secondary_is_away_is_made_again() -> None:
    async def test(world: World) -> None:
        await world.begin(hang=Step.REQUEST)
        await world.until(lambda: world.primary.ledger.pending is not None)
        world.disconnect()
        world.primary.engine_event(Suspended(True))
        world.connect()
        await recorded(world)
        assert world.p.state is SYNCING
        world.primary.engine_event(EngineCommitted())
        assert world.primary.ledger.failures == 1
        assert world.p.state is SYNCING

    play(test)


@pytest.mark.parametrize("host", ["p", "s"])
def test_a_map_that_refuses_is_told(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    monkeypatch.setattr("coloebpf.service.handing.TAKE_S", 0.01)
    monkeypatch.setattr("coloebpf.service.protecting.RETRY_S", 0.01)

    async def test(world: World) -> None:
        def refuse(*_: object) -> Iterator[list[str]]:
            raise BpfError("the kernel refuses to write a map: no memory")

        monkeypatch.setattr(
            world.sides[Role.PRIMARY if host == "p" else Role.SECONDARY].aliases,
            "texts" if host == "p" else "take",
            refuse,
        )
        await world.begin()
        await world.until(lambda: "can't begin yet" in caplog.text)
        assert "the kernel refuses to write a map" in caplog.text
        monkeypatch.undo()
        await world.states(LOCKSTEP, LOCKSTEP)

    play(test)
