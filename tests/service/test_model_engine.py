"""The engine of the tests does what it is told, and keeps the order of an engine's events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from coloebpf.errors import EngineError
from coloebpf.service.engine import Committed, DomainGone, EngineEvent, Failed, Ready, SecondaryGone, Suspended
from coloebpf.service.engines.model import ModelEngine, Step

SOON = 5.0  # seconds that an event may take on a busy machine


class Heard:
    """The engine's events, to be waited for one by one."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[EngineEvent] = asyncio.Queue()

    async def next(self) -> EngineEvent:
        return await asyncio.wait_for(self.queue.get(), SOON)

    async def silence(self) -> None:
        """Nothing comes, whatever was ready to run."""
        for _ in range(20):
            await asyncio.sleep(0)
        assert self.queue.empty()


Test = Callable[[ModelEngine, Heard], Awaitable[None]]


def play(test: Test, **how: Any) -> None:
    """Runs `test` with a started engine."""

    async def run() -> None:
        heard = Heard()
        engine = ModelEngine(heard.queue.put_nowait, 0.0, **how)
        await engine.start()
        assert await heard.next() == Ready()
        await test(engine, heard)
        await engine.stop()

    asyncio.run(run())


@pytest.mark.parametrize("signals", [True, False])
def test_a_checkpoint(signals: bool) -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        for number in (1, 2):
            await engine.request_checkpoint()
            assert [await heard.next(), await heard.next()] == [Suspended(), Committed()]
            assert (engine.requests, engine.commits) == (number, number)
        await heard.silence()

    play(test, signals_suspended=signals)


def test_the_time_to_the_commit() -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        engine.commit_delay_s = 0.05
        loop = asyncio.get_running_loop()
        await engine.request_checkpoint()
        assert await heard.next() == Suspended()
        begin = loop.time()
        assert await heard.next() == Committed()
        assert loop.time() - begin >= 0.045

    play(test)


@pytest.mark.parametrize(("step", "before"), [(Step.REQUEST, []), (Step.SUSPENDED, [Suspended()])])
def test_it_fails_as_often_as_told(step: Step, before: list[EngineEvent]) -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        engine.fail(step, times=2)
        for _ in range(2):
            await engine.request_checkpoint()
            assert [await heard.next() for _ in before] == before
            assert await heard.next() == Failed(f"told to fail at {step}")
        await engine.request_checkpoint()
        assert [await heard.next(), await heard.next()] == [Suspended(), Committed()]

    play(test)


@pytest.mark.parametrize(("step", "before"), [(Step.REQUEST, []), (Step.SUSPENDED, [Suspended()])])
def test_it_hangs_until_it_may_go_on(step: Step, before: list[EngineEvent]) -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        engine.hang(step)
        await engine.request_checkpoint()
        assert [await heard.next() for _ in before] == before
        await heard.silence()
        with pytest.raises(EngineError, match="under way"):
            await engine.request_checkpoint()
        engine.go()
        rest = [Suspended(), Committed()][len(before) :]
        assert [await heard.next() for _ in rest] == rest

    play(test)


def test_it_can_be_asked_again_out_of_the_event() -> None:
    async def run() -> None:
        events: list[EngineEvent] = []
        tasks: list[asyncio.Task[None]] = []
        done = asyncio.Event()

        def emit(event: EngineEvent) -> None:
            events.append(event)
            if event == Committed():
                tasks.append(asyncio.create_task(again()))

        async def again() -> None:
            if engine.commits < 3:
                await engine.request_checkpoint()
            else:
                done.set()

        engine = ModelEngine(emit, 0.0)
        await engine.start()
        await engine.request_checkpoint()
        await asyncio.wait_for(done.wait(), SOON)
        assert events == [Ready(), *[Suspended(), Committed()] * 3]

    asyncio.run(run())


@pytest.mark.parametrize("during", [False, True])
def test_it_dies(during: bool) -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        if during:
            engine.hang()
            await engine.request_checkpoint()
            assert await heard.next() == Suspended()
        engine.die("for a test")
        assert await heard.next() == Failed("for a test", fatal=True)
        engine.go()
        await heard.silence()
        with pytest.raises(EngineError, match="died: for a test"):
            await engine.request_checkpoint()
        with pytest.raises(EngineError, match="died: for a test"):
            await engine.failover()

    play(test)


@pytest.mark.parametrize(
    ("what", "event"),
    [("lose_secondary", SecondaryGone("told so")), ("lose_domain", DomainGone("told so"))],
)
def test_a_guest_goes(what: str, event: EngineEvent) -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        engine.hang()
        await engine.request_checkpoint()
        assert await heard.next() == Suspended()
        getattr(engine, what)()
        assert await heard.next() == event
        engine.go()
        await heard.silence()

    play(test)


def test_a_failover_ends_what_is_under_way() -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        engine.hang(Step.REQUEST)
        await engine.request_checkpoint()
        await engine.failover()
        engine.go()
        assert await heard.next() == Ready()
        await heard.silence()
        assert engine.failed_over

    play(test)


def test_what_was_stopped_is_silent() -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        engine.hang(Step.REQUEST)
        await engine.request_checkpoint()
        await engine.stop()
        engine.go()
        engine.die()
        await heard.silence()
        with pytest.raises(EngineError):
            await engine.request_checkpoint()

    play(test)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "Expecting"),
        ("7", "no such command"),
        ('{"do": "explode"}', "no such command"),
        ('{"do": "fail", "at": "night"}', "night"),
        ('{"do": "fail", "times": "x"}', "invalid literal"),
        ('{"do": "delay"}', "no such command"),
        ('{"do": "delay", "ms": -1}', "no such command"),
    ],
)
def test_a_wrong_command(text: str, error: str) -> None:
    async def test(engine: ModelEngine, heard: Heard) -> None:
        answer = engine.command(text)
        assert answer["ok"] is False
        assert error in answer["error"]

    play(test)


def test_commands_over_the_socket(tmp_path: Path) -> None:
    socket = tmp_path / "model.sock"
    socket.write_text("left by another one")

    async def test(engine: ModelEngine, heard: Heard) -> None:
        assert socket.stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(socket)

        async def tell(**command: object) -> dict[str, object]:
            writer.write(json.dumps(command).encode() + b"\n")
            answer: dict[str, object] = json.loads(await asyncio.wait_for(reader.readline(), SOON))
            return answer

        done = {"ok": True, "requests": 0, "commits": 0, "failed_over": False}
        assert await tell(do="show") == done
        assert await tell(do="delay", ms=7) == done
        assert engine.commit_delay_s == 0.007
        assert await tell(do="hang", at="request") == done
        await engine.request_checkpoint()
        await heard.silence()
        assert await tell(do="fail", at="suspended", times=1) == done | {"requests": 1}
        assert await tell(do="go") == done | {"requests": 1}
        assert [await heard.next(), await heard.next()] == [Suspended(), Failed("told to fail at suspended")]
        assert await tell(do="lose_secondary") == done | {"requests": 1}
        assert await tell(do="lose_domain") == done | {"requests": 1}
        assert await tell(do="die") == done | {"requests": 1}
        assert [await heard.next() for _ in range(3)] == [
            SecondaryGone("told so"),
            DomainGone("told so"),
            Failed("told to die", fatal=True),
        ]
        writer.close()

    play(test, socket=socket)
    assert not socket.exists()


def test_a_socket_that_can_not_be_made(tmp_path: Path) -> None:
    engine = ModelEngine(lambda event: None, 0.0, tmp_path / "none" / "x.sock")
    with pytest.raises(EngineError, match="can't listen"):
        asyncio.run(engine.start())
