"""A control socket with a service behind it that does what it is told, in a thread of the test's process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from coloebpf.errors import BpfError, ServiceError
from coloebpf.service.control_socket import ControlSocket
from coloebpf.service.status import Status
from tests.service import samples


class Service:
    """Tells `told` and `maps`, and notes what it is ordered. An order is done after `looks_due` statuses."""

    def __init__(self) -> None:
        self.told = samples.status()
        self.maps: dict[str, Any] | None = samples.snapshot()
        self.orders: list[tuple[str, str]] = []
        self.looks = self.looks_due = 0

    def status(self) -> Status:
        self.looks += 1
        return self.told

    def snapshot(self) -> dict[str, Any]:
        if self.maps is None:
            raise BpfError("no dataplane is loaded")
        return self.maps

    async def _order(self, command: str, pair: str) -> str:
        if pair not in ("web", "db"):
            raise ServiceError(f"there is no pair {pair!r}; there are web and db")
        while self.looks < self.looks_due:
            await asyncio.sleep(0.001)
        self.orders.append((command, pair))
        return f"{command} of {pair} is done"

    def longest_s(self, pair: str) -> float:
        return 0.0

    async def checkpoint(self, pair: str) -> str:
        return await self._order("checkpoint", pair)

    async def failover(self, pair: str) -> str:
        return await self._order("failover", pair)

    async def handover(self, pair: str) -> str:
        return await self._order("handover", pair)

    async def protect(self, pair: str) -> str:
        return await self._order("protect", pair)

    async def unprotect(self, pair: str) -> str:
        return await self._order("unprotect", pair)


@contextmanager
def running(path: Path, service: Service) -> Iterator[None]:
    """`service` answers at `path`."""
    ready = threading.Event()
    loop = asyncio.new_event_loop()
    ended = asyncio.Event()

    async def serve() -> None:
        server = ControlSocket(path, service, service)
        await server.start()
        ready.set()
        await ended.wait()
        await server.stop()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    assert ready.wait(5)
    try:
        yield
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join()
        loop.close()
