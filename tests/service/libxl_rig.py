"""An engine and whoever talks to it, for tests: events to wait for, sessions of libxl as processes, strangers' bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.model import Role
from coloebpf.service.engine import EngineEvent
from coloebpf.service.engines.libxl_colo import LibxlColoEngine
from coloebpf.service.fdstore import Notifier

WAIT_S = 30.0  # for anything that a test waits for
PATIENT_NS = 10**9  # `late_ns` of tests that are about something else, on a busy machine

INIT = b"\0\0\0\x19COLO_USERSPACE_PROXY_INIT"
INIT_ANSWER = b"\0\0\0\x19COLO_COMPARE_GET_XEN_INIT"
COLO_CHECKPOINT = b"\0\0\0\x0fCOLO_CHECKPOINT"
DO_CHECKPOINT = b"\0\0\0\x0eDO_CHECKPOINT\0"


class Rig:
    """An engine, its events in order. `alive`: what is answered about the guest; None: nobody can say."""

    def __init__(self, notifier: Notifier | None = None, late_ns: int = PATIENT_NS, role: Role = Role.PRIMARY) -> None:
        self.alive: bool | None = True
        self.events: asyncio.Queue[EngineEvent] = asyncio.Queue()
        self.peers: list[LibxlProcess] = []
        self.engine = LibxlColoEngine(
            "web", role, ("127.0.0.1", 0), self.events.put_nowait, self._domain_alive, notifier or Notifier(), late_ns
        )

    async def _domain_alive(self) -> bool:
        if self.alive is None:
            raise EngineError("xenstored is not there")
        return self.alive

    async def libxl(self, command: list[str], count: int, ms: int = 1) -> LibxlProcess:
        """Starts a libxl that connects to this engine; it is gone when the rig is."""
        peer = await LibxlProcess.start(command, self.engine.port, count, ms)
        self.peers.append(peer)
        return peer

    async def next(self) -> EngineEvent:
        """The next event; fails the test if none comes."""
        return await asyncio.wait_for(self.events.get(), WAIT_S)

    async def expect(self, *events: EngineEvent) -> None:
        for event in events:
            came = await self.next()
            assert came == event, f"{came} instead of {event}"

    def quiet(self) -> bool:
        """No event is left."""
        return self.events.empty()


@asynccontextmanager
async def rigged(**how: Any) -> AsyncIterator[Rig]:
    """A Rig whose engine is started."""
    rig = Rig(**how)
    await rig.engine.start()
    try:
        yield rig
    finally:
        await rig.engine.stop()
        for peer in rig.peers:
            peer.kill()
            await peer.rest()


class Stranger:
    """A connection whose bytes the test writes itself."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.socket: socket.socket = writer.get_extra_info("socket")

    @classmethod
    async def connect(cls, port: int) -> Stranger:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    @classmethod
    async def as_libxl(cls, rig: Rig) -> Stranger:
        """INIT and its answer."""
        self = await cls.connect(rig.engine.port)
        self.send(INIT)
        assert await self.read(len(INIT_ANSWER)) == INIT_ANSWER
        return self

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read(self, count: int) -> bytes:
        return await asyncio.wait_for(self.reader.readexactly(count), WAIT_S)

    async def closed(self) -> bool:
        """The other side has closed; a reset counts too."""
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(self.reader.read(1), WAIT_S) == b""
        return True

    def segments_in(self) -> int:
        """How many segments with data have come: TCP_INFO's tcpi_data_segs_in."""
        info = self.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 192)
        return int(struct.unpack_from("=I", info, 152)[0])

    def close(self) -> None:
        self.writer.close()


class LibxlProcess:
    """A session of libxl in a process: `command` is xen/peer.c's program or libxl_peer.py. `lines`: what it has printed."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[list[str]] = []

    @classmethod
    async def start(cls, command: list[str], port: int, count: int, ms: int = 1) -> LibxlProcess:
        return cls(
            await asyncio.create_subprocess_exec(
                *command, "127.0.0.1", str(port), str(count), str(ms), stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
        )  # fmt: skip

    async def line(self) -> list[str]:
        """The next line, as words; [] at the end."""
        assert self.process.stdout is not None
        words = (await asyncio.wait_for(self.process.stdout.readline(), WAIT_S)).decode().split()
        if words:
            self.lines.append(words)
        return words

    async def until(self, word: str) -> list[str]:
        """Reads on to the next line that begins with `word`."""
        while words := await self.line():
            if words[0] == word:
                return words
        raise AssertionError(f"it ended without another {word!r}; its last lines: {self.lines[-3:]}")

    async def rest(self) -> int:
        """Reads to the end; its exit code."""
        while await self.line():
            pass
        return await self.process.wait()

    async def forked(self) -> None:
        """The child is there that waits for a request."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        async with asyncio.timeout(WAIT_S):
            while not children.read_text():
                await asyncio.sleep(0.01)

    def kill(self, whole: bool = True) -> None:
        """SIGKILL to it and, if `whole`, to the child that waits in it."""
        with contextlib.suppress(ProcessLookupError):
            if whole:
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()

    def of(self, word: str) -> list[list[str]]:
        return [words for words in self.lines if words[0] == word]
