"""Both supervisors of one pair, a link between them, and fakes of what is outside: dataplanes, witness, arbiter."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from coloebpf.control import PairState
from coloebpf.errors import EngineError
from coloebpf.model import Role, State
from coloebpf.service.arbiters.base import Arbiter, Grant, Protected, Refusal
from coloebpf.service.comparer import Finding
from coloebpf.service.config import PairConfig
from coloebpf.service.engine import Emit, Engine
from coloebpf.service.engines.model import ModelEngine, Step
from coloebpf.service.outside import Outside
from coloebpf.service.pair import Supervisor
from coloebpf.service.peer.messages import Message
from coloebpf.service.primary import Primary
from coloebpf.service.secondary import Secondary

SOON = 5.0  # seconds that anything may take on a busy machine
P, S = Role.PRIMARY, Role.SECONDARY
UNPROTECTED, SYNCING, LOCKSTEP, CHECKPOINTING = State.UNPROTECTED, State.SYNCING, State.LOCKSTEP, State.CHECKPOINTING
PASSTHROUGH, PROMOTED, HALTED = State.PASSTHROUGH, State.PROMOTED, State.HALTED


class Dataplane:
    """One pair's entry; `writes` has every change in order."""

    def __init__(self, host: str, story: list[str], touch: Callable[[], None]) -> None:
        self.word = PairState(UNPROTECTED, 0)
        self.deadline_ns = self.open_after_ns = 0
        self._host, self._story, self._touch = host, story, touch

    def _write(self, what: str, state: State, epoch: int) -> None:
        self.word = PairState(state, epoch)
        self._story.append(f"{self._host} {what}")
        self._touch()

    def state(self, pair: int) -> PairState:
        return self.word

    def set_state(self, pair: int, state: State) -> None:
        self._write(state.name.lower(), state, self.word.epoch)

    def deadline(self, pair: int) -> int:
        return self.deadline_ns

    def set_deadline(self, pair: int, deadline_ns: int) -> None:
        self.deadline_ns = deadline_ns
        self._story.append(f"{self._host} deadline {deadline_ns}")

    def set_open_after(self, pair: int, ns: int) -> None:
        self.open_after_ns = ns

    def suspend(self, pair: int) -> int:
        self._write("suspend", CHECKPOINTING, self.word.epoch + 1)
        return self.word.epoch

    def commit(self, pair: int) -> int:
        self._write("commit", LOCKSTEP, self.word.epoch)
        return 0

    def clear_translations(self, pair: int) -> int:
        self._write("clear", self.word.state, self.word.epoch + 1)
        return self.word.epoch

    def settle_translations(self, pair: int) -> None:
        self._story.append(f"{self._host} settle")

    def kick(self) -> int:
        self._story.append(f"{self._host} kick")
        return 0


class FakeAliases:
    """Connections that have other numbers, as texts."""

    def __init__(self, host: str, story: list[str]) -> None:
        self.there: list[str] = []
        self.looks = 0
        self._host, self._story = host, story

    def keep(self) -> int:
        self._story.append(f"{self._host} keep")
        return len(self.there)

    def texts(self) -> Iterator[list[str]]:
        for at in range(0, len(self.there), 100):
            yield self.there[at : at + 100]

    def clear(self) -> Iterator[None]:
        while self.there:
            yield
            self.there = self.there[100:]

    def take(self, texts: Sequence[str]) -> None:
        self.there = [*self.there, *texts]

    def end_idle(self) -> Iterator[None]:
        self.looks += 1
        yield from [None] * (len(self.there) // 100)


class FakeWitness:
    """Grants that nobody sees; `safe` may be held back."""

    def __init__(self) -> None:
        self.granting = self.lost = False
        self.safe = asyncio.Event()
        self.safe.set()
        self.waited = 0

    def set_granting(self, pair: int, on: bool) -> None:
        self.granting = on

    def is_lost(self, pair: int) -> bool:
        return self.lost

    async def wait_safe(self, pair: int) -> None:
        assert not self.granting
        self.waited += 1
        await self.safe.wait()


class FakeArbiter:
    """Answers with what was put into `answers`, and waits for it."""

    def __init__(self, touch: Callable[[], None], promotes: bool, leased: bool) -> None:
        self._touch = touch
        self.name, self.promotes, self.leased = "fake", promotes, leased
        self.begun = 0
        self.rested: list[int] = []  # seconds that a right was to last
        self.asked: list[Role] = []
        self.released: Grant | Refusal | Exception = Grant()
        self.begin_errors: list[Exception] = []
        self.answers: dict[Role, asyncio.Queue[Grant | Refusal]] = {role: asyncio.Queue() for role in Role}

    async def check(self) -> None: ...

    async def begin(self, pair: Protected) -> None:
        if self.begin_errors:
            raise self.begin_errors.pop(0)
        self.begun += 1

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        self.asked.append(pair.role)
        self._touch()
        return await self.answers[pair.role].get()

    async def renew(self, pair: Protected, seconds: int = 0) -> Grant | Refusal:
        if seconds:
            self.rested.append(seconds)
        return await self.answers[pair.role].get()

    async def release(self, pair: Protected) -> Grant | Refusal:
        if isinstance(self.released, Exception):
            raise self.released
        return self.released

    async def close(self) -> None: ...


@dataclass
class Side:
    """One host's."""

    plane: Dataplane
    aliases: FakeAliases
    witness: FakeWitness
    pair: Supervisor
    engine: ModelEngine
    sent: list[Message] = field(default_factory=list)

    @property
    def state(self) -> State:
        """As the programs have it; the supervisor agrees."""
        assert self.pair.machine.state is self.plane.word.state
        return self.plane.word.state


class World:
    """Two hosts. `story`: what their dataplanes and engines were told, in order."""

    def __init__(self, *, careful: bool = False, leased: bool = False, promotes: bool = True, **config: Any) -> None:
        self.story: list[str] = []
        self.announced: list[str] = []
        self.arbiter = FakeArbiter(self.touch, promotes, leased)
        self._arbiter: Arbiter = self.arbiter
        self.link = False
        self.latency: Callable[[], float] = lambda: 0.0
        self._due = dict.fromkeys(Role, 0.0)
        self._session = 0
        self.lose: Callable[[Message], bool] = lambda message: False
        self.on_touch: Callable[[], None] = lambda: None
        self.comes_back = True  # an engine whose service is started anew
        self.guest: bool | EngineError = True  # whether the PVM lives, for an engine that has to ask
        self.spawned: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        usual: dict[str, Any] = {"name": "web", "number": 3, "engine": "model", "nics": (), "interval_min_ms": 0, "periodic_interval_ms": 10}  # fmt: skip
        self.config = PairConfig(role=P, **usual | config)
        self._careful = careful
        self.sides = {role: self._side(role) for role in Role}
        self.p, self.s = self.sides[P], self.sides[S]

    @property
    def primary(self) -> Primary:
        assert isinstance(self.p.pair, Primary)
        return self.p.pair

    @property
    def secondary(self) -> Secondary:
        assert isinstance(self.s.pair, Secondary)
        return self.s.pair

    def _side(self, role: Role, word: PairState | None = None) -> Side:
        host = role.name[0].lower()
        plane = Dataplane(host, self.story, self.touch)
        if word is not None:
            plane.word = word
        aliases, witness, engines = FakeAliases(host, self.story), FakeWitness(), list[ModelEngine]()

        def make_engine(emit: Emit) -> Engine:
            engines.append(AskingEngine(host, self, emit, signals_suspended=not self._careful))
            return engines[0]

        def send(message: Message) -> bool:
            side.sent.append(message)
            if self.link and not self.lose(message):
                loop = asyncio.get_running_loop()
                self._due[role] = max(
                    self._due[role] + 1e-6, loop.time() + self.latency()
                )  # in order, as on a connection
                loop.call_at(self._due[role], self._deliver, role, message, self._session)
            return self.link

        outside = Outside(
            plane, send, witness, self._arbiter, time.monotonic_ns, lambda c: self.announced.append(c.name), aliases
        )
        kind = Primary if role is P else Secondary
        side = Side(plane, aliases, witness, kind(replace(self.config, role=role), make_engine, outside), engines[0])
        side.pair.machine.listeners.append(lambda change: self.touch())
        return side

    def use_arbiter(self, arbiter: Arbiter) -> None:
        """In place of the one that a test answers for; before the start."""
        self._arbiter = arbiter
        self.sides = {role: self._side(role) for role in Role}
        self.p, self.s = self.sides[P], self.sides[S]

    def _deliver(self, sender: Role, message: Message, session: int) -> None:
        if self.link and session == self._session:
            self.sides[S if sender is P else P].pair.received(message)
            self.touch()

    def touch(self) -> None:
        """Somebody may be waiting for this."""
        if hasattr(self, "s"):
            self.on_touch()
        self._changed.set()

    async def until(self, true: Callable[[], bool]) -> None:
        """Waits for it to become true by something that happens."""
        async with asyncio.timeout(SOON):
            while not true():
                self._changed.clear()
                await self._changed.wait()

    async def states(self, primary: State, secondary: State) -> None:
        """Waits for both."""
        try:
            await self.until(lambda: (self.p.plane.word.state, self.s.plane.word.state) == (primary, secondary))
        except TimeoutError:
            raise AssertionError(f"{self.p.state.name}, {self.s.state.name} after {self.story}") from None

    async def settle(self) -> None:
        """Whatever is ready to run has run."""
        for _ in range(50):
            await asyncio.sleep(0)

    async def restart(self, role: Role) -> None:
        """The service of one host is killed and started again: only its dataplane remembers."""
        old = self.sides[role]
        await old.pair.stop()
        self.disconnect()
        side = self._side(role, old.plane.word)
        side.plane.deadline_ns = old.plane.deadline_ns
        self.sides[role] = side
        self.p, self.s = self.sides[P], self.sides[S]
        await side.pair.start()

    def connect(self) -> None:
        """The link comes up, with hellos."""
        self.link = True
        self._session += 1
        notes = {role: side.pair.note() for role, side in self.sides.items()}
        self.p.pair.link_up(notes[S])
        self.s.pair.link_up(notes[P])

    def disconnect(self) -> None:
        self.link = False
        for side in self.sides.values():
            side.pair.link_down()

    def part(self) -> None:
        """Both paths are cut, and both hosts have noticed."""
        self.disconnect()
        for side in self.sides.values():
            side.pair.peer_lost()

    def find(self, kind: str = "divergence", reason: str = "payload", epoch: int | None = None) -> None:
        """The primary's comparer finds something; of the present epoch if there is no other."""
        epoch = self.p.plane.word.epoch if epoch is None else epoch
        self.primary.found(Finding(kind, reason, 0, epoch, 0, 1, "flow", 0, "a", "b", True))

    async def begin(self, hang: Step | None = None) -> None:
        """Both services and the link, and an operator asks for protection. `hang`: where the first copy stops."""
        for side in self.sides.values():
            await side.pair.start()
        if hang is not None:
            self.p.engine.hang(hang)
        self.connect()
        await self.primary.protect()

    async def begin_first_copy(self) -> None:
        """Likewise; it has been asked for, and stops there until go()."""
        await self.begin(hang=Step.REQUEST)
        await self.until(lambda: "p request" in self.story)

    async def protected(self) -> None:
        """From nothing to lock-step."""
        await self.begin()
        self.primary.lease(time.monotonic_ns() + 10**12)
        self.primary.consider()
        await self.states(LOCKSTEP, LOCKSTEP)
        await self.settle()


class StoryEngine(ModelEngine):
    """Tells when it is asked."""

    def __init__(self, host: str, world: World, emit: Emit, *, signals_suspended: bool) -> None:
        super().__init__(emit, 0.0, signals_suspended=signals_suspended)
        self._host, self._world = host, world

    async def start(self) -> None:
        if self._world.comes_back:
            await super().start()
        else:
            self._running = True

    async def request_checkpoint(self) -> None:
        self._world.story.append(f"{self._host} request")
        await super().request_checkpoint()
        self._world.touch()

    async def failover(self) -> None:
        self._world.story.append(f"{self._host} failover")
        await super().failover()


class AskingEngine(StoryEngine):
    """Can ask for its guest, as libxl's can."""

    async def guest_lives(self) -> bool:
        if isinstance(self._world.guest, EngineError):
            raise self._world.guest
        return self._world.guest


def play(test: Callable[[World], Awaitable[None]], **how: Any) -> None:
    """Runs a test in a world of its own."""

    async def run() -> None:
        world = World(**how)
        try:
            await test(world)
        finally:
            for side in world.sides.values():
                await side.pair.stop()

    asyncio.run(run())
