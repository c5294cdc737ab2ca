"""Connections that clients know by other numbers than the guest: kept at a change of roles, and handed on."""

from __future__ import annotations

import pytest

from coloebpf.aliases import TEXT_LENGTH
from coloebpf.service import pair
from coloebpf.service.peer.messages import ALIASES_MAX, Aliases, AliasesTaken, Committed, Message
from tests.service.pair_world import LOCKSTEP, PASSTHROUGH, PROMOTED, SYNCING, UNPROTECTED, World, play


def entries(count: int) -> list[str]:
    return [f"{number:0{TEXT_LENGTH}x}" for number in range(count)]


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
        def refuse(texts: object, anew: bool) -> None:
            raise ValueError("the pair has no NIC 2")

        monkeypatch.setattr(world.s.aliases, "take", refuse)
        for side in world.sides.values():
            await side.pair.start()
        world.connect()
        await world.primary.protect()
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
