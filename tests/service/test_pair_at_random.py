"""Random faults on a pair with its real supervisors: whatever happens when, nothing unproven and never two speakers."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from coloebpf.errors import PairError
from coloebpf.model import Role, State
from coloebpf.service.arbiters.base import Grant, Protected, Refusal
from coloebpf.service.engines.model import Step
from tests.service.pair_world import HALTED, LOCKSTEP, PASSTHROUGH, PROMOTED, SYNCING, UNPROTECTED, P, S, World, play

STEPS = 60
SPEAKING = (UNPROTECTED, SYNCING, PASSTHROUGH)  # in these states the primary sends what nobody has proven


class Record:
    """An arbiter with a memory, as etcd's record is: both may ask, one gets the yes, and keeps it until a new copy."""

    name, promotes, leased = "record", True, False

    def __init__(self, dice: random.Random) -> None:
        self.right: Role | str | None = None
        self._dice = dice

    async def _think(self) -> None:
        await asyncio.sleep(self._dice.choice([0, 0, 0.001, 0.003]))

    async def check(self) -> None: ...

    async def begin(self, pair: Protected) -> None:
        await self._think()
        self.right = "both"

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        await self._think()
        if self.right == "both":
            self.right = pair.role
        await self._think()
        return Grant() if self.right is pair.role else Refusal(f"right is {self.right}")

    async def renew(self, pair: Protected, seconds: int = 0) -> Grant | Refusal:
        return Grant()

    async def release(self, pair: Protected) -> Grant | Refusal:
        await self._think()
        if self.right is not None and self.right not in ("both", pair.role):
            return Refusal("the other one has it")
        self.right = None
        return Grant()

    async def close(self) -> None: ...


class Nobody(Record):
    """No arbiter: a primary may always go on, a secondary never by itself."""

    name, promotes = "nobody", False

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        assert pair.role is P
        return Grant()


class Watcher:
    """Looks at every write into a dataplane. `stale`: the client knows what the SVM's copy does not include."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.stale = True
        self.seen: set[tuple[State, State]] = set()

    def look(self) -> None:
        p, s = self.world.p.plane.word.state, self.world.s.plane.word.state
        self.seen.add((p, s))
        story = "\n".join(self.world.story[-40:])
        if self.world.story and self.world.story[-1] == "p commit":
            self.stale = False
        if p in SPEAKING:
            self.stale = True
            assert s is not PROMOTED, f"two speakers:\n{story}"
        if s is PROMOTED and self.world.story[-1] == "s promoted":
            assert not self.stale, f"an old copy has taken over:\n{story}"


async def fault(world: World, dice: random.Random) -> None:
    """One thing that can happen."""
    what = dice.choice(
        [
            "find",
            "find",
            "find",
            "cut",
            "mend",
            "mend",
            "lost_p",
            "lost_s",
            "hang",
            "go",
            "go",
            "fail",
            "svm_gone",
            "svm_dies",
            "restart_p",
            "restart_s",
            "protect",
            "protect",
            "unprotect",
            "checkpoint",
            "switch",
            "wait",
            "wait",
        ]
    )
    world.story.append(f"-- {what}")
    engine = world.p.engine
    match what:
        case "find":
            world.find()
        case "cut":
            world.disconnect()
        case "mend" if not world.link:
            world.connect()
            for side in world.sides.values():
                side.pair.peer_back()
        case "lost_p":
            world.p.pair.peer_lost()
        case "lost_s":
            world.s.pair.peer_lost()
        case "hang":
            engine.hang(dice.choice(list(Step)))
        case "go":
            engine.go()
        case "fail":
            engine.fail(dice.choice(list(Step)))
        case "svm_gone":
            engine.lose_secondary()
        case "svm_dies" if world.s.state is not PROMOTED and dice.random() < 0.3:
            world.s.engine.lose_domain()
        case "restart_p" | "restart_s":
            await world.restart(P if what[-1] == "p" else S)
        case "protect" | "unprotect" | "switch":
            # An operator does not protect a guest that runs on the other host.
            if what == "switch" and dice.random() < 0.7:
                return
            if world.s.state is not PROMOTED:
                world.spawned.append(asyncio.create_task(operator(world, what)))
        case "checkpoint":
            world.spawned.append(asyncio.create_task(operator(world, what)))
        case "wait":
            await asyncio.sleep(dice.choice([0, 0.001, 0.005]))


async def operator(world: World, what: str) -> None:
    """A wish that may be refused."""
    pair = world.primary
    wish = {
        "protect": pair.protect,
        "unprotect": pair.unprotect,
        "checkpoint": pair.checkpoint,
        "switch": pair.failover,
    }
    with contextlib.suppress(PairError):
        await wish[what]()


SEEN: set[tuple[State, State]] = set()


@pytest.mark.parametrize("careful", [False, True])
@pytest.mark.parametrize("arbiter", [Record, Nobody])
@pytest.mark.parametrize("seed", range(75))
def test_random_faults(seed: int, arbiter: type[Record], careful: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("coloebpf.service.asking.PREPARE_S", 0.02)
    monkeypatch.setattr("coloebpf.service.parting.DISMISS_S", 0.02)
    monkeypatch.setattr("coloebpf.service.protecting.RETRY_S", 0.005)
    dice = random.Random(seed)

    async def test(world: World) -> None:
        world.use_arbiter(arbiter(dice))
        if dice.random() < 0.5:
            world.latency = lambda: dice.choice([0, 0.001, 0.004])
        watcher = Watcher(world)
        world.on_touch = watcher.look
        await world.begin()
        if dice.random() < 0.8:
            with contextlib.suppress(TimeoutError):  # a machine that stands still for 100 ms is a fault, too
                await world.until(lambda: (world.p.plane.word.state, world.s.plane.word.state) == (LOCKSTEP, LOCKSTEP))
        for _ in range(STEPS):
            await fault(world, dice)
            if dice.random() < 0.7:
                await asyncio.sleep(0)
        await asyncio.sleep(0.03)
        for task in world.spawned:
            task.cancel()
        SEEN.update(watcher.seen)

    play(test, careful=careful, commit_timeout_ms=100)


def test_the_faults_have_led_everywhere() -> None:
    """Of the walks before; by itself it has nothing to say."""
    if not SEEN:
        pytest.skip("no walks in this run")
    assert {s for _, s in SEEN} >= {UNPROTECTED, SYNCING, LOCKSTEP, PROMOTED, HALTED}
    assert {p for p, _ in SEEN} >= {UNPROTECTED, SYNCING, LOCKSTEP, PASSTHROUGH, HALTED}
    assert (HALTED, PROMOTED) in SEEN
    assert (PASSTHROUGH, HALTED) in SEEN
