"""The service ends, by kill -9 or by order, and libxl notices nothing: the test plays systemd."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.service import xen_source
from tests.service.fake_systemd import FakeSystemd
from tests.service.libxl_rig import WAIT_S, LibxlProcess

MODULE = "tests.service.engine_process"
CHECKPOINT_MS = 20  # of the session's libxl


@pytest.fixture(params=["reference", "xen"])
def libxl(request: pytest.FixtureRequest) -> list[str]:
    if request.param == "reference":
        return [sys.executable, "-m", "tests.service.libxl_peer"]
    try:
        return [str(xen_source.peer())]
    except xen_source.NotToBeHadError as e:
        pytest.skip(f"Xen's source is not to be had: {e}")


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[FakeSystemd]:
    manager = FakeSystemd(tmp_path)
    yield manager
    manager.close()


class Service:
    """The unit: its present main process, started anew as systemd would."""

    def __init__(self, systemd: FakeSystemd, state: Path) -> None:
        self._systemd, self._state = systemd, state
        self.port = 0
        self.process: subprocess.Popen[str] | None = None
        self.lines: asyncio.Queue[str] = asyncio.Queue()

    async def start(self) -> None:
        self.process = self._systemd.start(
            "-m", MODULE, str(self.port), str(self._state), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.lines = asyncio.Queue()
        loop = asyncio.get_running_loop()
        stream = self.process.stdout
        assert stream is not None
        os.set_blocking(stream.fileno(), False)
        rest = ""

        def readable() -> None:
            nonlocal rest
            data = os.read(stream.fileno(), 65536).decode()
            if not data:
                loop.remove_reader(stream.fileno())
            *whole, rest = (rest + data).split("\n")
            for line in whole:
                self.lines.put_nowait(line)

        loop.add_reader(stream.fileno(), readable)
        self.port = int((await self.until("listening")).split()[1])  # behind what an adopted session has told

    async def until(self, beginning: str) -> str:
        """The next line that begins so."""
        async with asyncio.timeout(WAIT_S):
            while not (line := await self.lines.get()).startswith(beginning):
                pass
        return line

    def command(self, word: str) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self._reap()

    def stop(self) -> None:
        self.command("stop")
        self._reap()

    def _reap(self) -> None:
        assert self.process is not None
        self.process.wait(WAIT_S)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asyncio.get_running_loop().remove_reader(self.process.stdout.fileno())
        self.process.stdin.close()
        self.process.stdout.close()
        self.process = None
        self._systemd.hear()


@asynccontextmanager
async def session(
    systemd: FakeSystemd, tmp_path: Path, libxl: list[str]
) -> AsyncIterator[tuple[Service, LibxlProcess]]:
    """A service with a libxl whose first checkpoint is done."""
    service = Service(systemd, tmp_path / "state")
    await service.start()
    peer = await LibxlProcess.start(libxl, service.port, 0, CHECKPOINT_MS)
    try:
        await service.until("Committed")
        yield service, peer
    finally:
        service.kill()
        peer.kill()
        await peer.rest()


async def next_checkpoint_ns(peer: LibxlProcess) -> int:
    """When libxl made it."""
    return int((await peer.until("checkpoint"))[2])


async def checkpoints_within(peer: LibxlProcess, seconds: float) -> int:
    before = len(peer.of("checkpoint"))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while await peer.line():
                pass
    return len(peer.of("checkpoint")) - before


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_given_a_session_when_the_service_ends_then_libxl_waits_and_the_next_process_goes_on(
    systemd: FakeSystemd, tmp_path: Path, libxl: list[str], how: str
) -> None:
    async def body() -> None:
        async with session(systemd, tmp_path, libxl) as (service, peer):
            for _ in range(3):
                service.kill() if how == "kill" else service.stop()
                assert [name for name, _ in systemd.kept] == ["libxl-colo.web"]
                assert await checkpoints_within(peer, 0.5) <= 1, "a storm: one may have been on its way"
                await service.start()
                service.command("ask")
                await service.until("Suspended(requested=True)")
                await service.until("Committed")

    asyncio.run(body())


def test_given_a_request_on_its_way_when_the_service_is_killed_then_it_is_one_checkpoint(
    systemd: FakeSystemd, tmp_path: Path, libxl: list[str]
) -> None:
    async def body() -> None:
        async with session(systemd, tmp_path, libxl) as (service, peer):
            await next_checkpoint_ns(peer)  # libxl's first, by itself
            for moment in ("asking", *["asked"] * 4):
                service.command("ask")
                await service.until(moment)
                service.kill()  # before it was sent, perhaps, or while libxl works on it
                in_doubt = (tmp_path / "state").read_text() == "asked"  # else libxl was faster than the kill
                await service.start()
                # However far it came: the next COLO_CHECKPOINT ends the doubt. libxl sends one after 5 s if nobody asks.
                if in_doubt:
                    await service.until("Suspended(requested=True)")
                await next_checkpoint_ns(peer)
                assert await checkpoints_within(peer, 10 * CHECKPOINT_MS / 1000) == 0
                service.command("ask")
                await service.until("Suspended(requested=True)")
                await service.until("Committed")
                await next_checkpoint_ns(peer)

    asyncio.run(body())


def test_given_libxl_is_gone_meanwhile_then_the_next_process_hears_of_it(
    systemd: FakeSystemd, tmp_path: Path, libxl: list[str]
) -> None:
    async def body() -> None:
        async with session(systemd, tmp_path, libxl) as (service, peer):
            service.kill()
            peer.kill()
            await peer.rest()
            await service.start()
            await service.until("SecondaryGone")
            service.stop()
            assert systemd.kept == [], "the dead connection is not kept"

    asyncio.run(body())


def test_given_nobody_keeps_the_connection_when_the_service_is_killed_then_libxl_checkpoints_without_pause(
    systemd: FakeSystemd, tmp_path: Path, libxl: list[str]
) -> None:
    """What all this is for, and that the tests above would see it."""

    async def body() -> None:
        async with session(systemd, tmp_path, libxl) as (service, peer):
            service.kill()
            for _, fd in systemd.kept:
                os.close(fd)
            systemd.kept.clear()
            await next_checkpoint_ns(peer)  # the one before the end
            first, *_, sixth = [await next_checkpoint_ns(peer) for _ in range(6)]
            assert sixth - first < 4_000_000_000, "ns: a libxl that waits for requests takes 5 s from one to the next"

    asyncio.run(body())
