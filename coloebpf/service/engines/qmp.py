"""One QEMU's monitor: commands that end in time, events in order, and its death as an event."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener

from coloebpf.errors import EngineError

TIMEOUT_S = 2.0  # for one command; a healthy QEMU answers in about a millisecond
CLOSE_S = 0.5  # for taking leave of one that may not listen any more

# The library logs each broken connection with a traceback; what it means is told here.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

OnEvent = Callable[[str, Mapping[str, Any]], None]


class Qmp:
    """A connection. `on_event(name, data)` and, once, `on_gone()` are called on the event loop until close()."""

    def __init__(self, name: str, on_event: OnEvent, on_gone: Callable[[], None]) -> None:
        self.name = name
        self._client = QMPClient(name)
        self._listener = EventListener()
        self._client.register_listener(self._listener)
        self._on_event, self._on_gone = on_event, on_gone
        self._tasks: list[asyncio.Task[None]] = []
        self._closed = False

    async def connect(self, path: Path) -> None:
        """Raises EngineError if nobody, or somebody who is no QEMU, is there."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                await self._client.connect(str(path))
        except (QMPError, OSError, TimeoutError) as e:
            await self._leave()
            raise EngineError(f"no QEMU answers at {path}: {e or 'it took too long'}") from e
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._hear()), loop.create_task(self._watch())]

    async def do(self, command: str, /, **arguments: object) -> Any:
        """What QEMU returns. Raises EngineError if it refuses, is gone, or does not answer in time.

        In the arguments' names `_` stands for `-`.
        """
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        try:
            # Not wait_for(): Python 3.11's may swallow a cancellation that comes together with the answer.
            async with asyncio.timeout(TIMEOUT_S):
                return await self._client.execute(command, named or None)
        except ExecuteError as e:
            raise EngineError(f"{self.name} refuses {command}: {e}") from e
        except TimeoutError as e:
            raise EngineError(f"{self.name} has not answered {command} in {TIMEOUT_S:g} s") from e
        except (QMPError, OSError) as e:
            raise EngineError(f"{self.name} is gone: {command} has no answer") from e

    async def give(self, fd: int, name: str) -> None:
        """Hands over a file descriptor, which a later command calls `name`. Raises EngineError."""
        try:
            self._client.send_fd_scm(fd)
        except (QMPError, OSError) as e:
            raise EngineError(f"{self.name} takes no descriptor: {e}") from e
        await self.do("getfd", fdname=name)

    async def close(self) -> None:
        """Says nothing any more; QEMU goes on."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._leave()

    async def _leave(self) -> None:
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._client.disconnect()

    async def _hear(self) -> None:
        async for event in self._listener:
            self._on_event(str(event["event"]), cast("Mapping[str, Any]", event.get("data") or {}))

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        if not self._closed:
            self._on_gone()
