"""One copy of the PVM on its way: the standby that it goes into, and what has come true of it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.service.engines.qemu_filling import Filling
from coloebpf.service.engines.qemu_relay import Relay
from coloebpf.service.engines.standby import Standby


class Copy:
    """One standby being filled, and what is heard of it. `wake` is set when its work must look again."""

    def __init__(self, standby: Standby, wake: asyncio.Event) -> None:
        loop = asyncio.get_running_loop()
        self.number = standby.number
        self.standby = standby
        self._wake = wake
        self.relay: Relay | None = None
        self.filling: Filling | None = None
        self.refused = ""  # why no copy of this guest makes sense
        self.switching = False  # the secondary was told that the checkpoint comes
        self.cutting = False  # and to close the disks
        self.stood = False  # the PVM has come to a standstill for it
        self.suspended = False  # and that was told
        self.stop, self.moved, self.switched, self.cut, self.whole = (loop.create_future() for _ in range(5))
        self.futures: tuple[asyncio.Future[None], ...] = (self.stop, self.moved, self.switched, self.cut, self.whole)

    def fail(self, reason: str) -> None:
        """Whoever waits for something of it hears that it won't come."""
        for future in self.futures:
            if not future.done():
                future.set_exception(EngineError(reason))
                future.exception()  # nobody need look at it

    @property
    def cut_open(self) -> bool:
        """Nobody knows here whether the secondary has closed the disks."""
        return self.cutting and (not self.cut.done() or self.cut.exception() is not None)

    def heard(self, word: str, detail: str) -> None:
        """The secondary has said something of it."""
        match word:
            case "cut":
                self._came(self.cut)
            case "switched":
                self._came(self.switched)
            case "whole":
                self._came(self.whole)
            case "lost":
                self.fail(detail)
                self._wake.set()

    def event(self, name: str, data: Mapping[str, Any]) -> None:
        """Of the PVM's QEMU."""
        if name == "STOP":
            self.stood = True
            self._came(self.stop)
            self._wake.set()
        elif name == "MIGRATION" and data.get("status") == "completed":
            self._came(self.moved)
        elif name == "MIGRATION" and data.get("status") in ("failed", "cancelled"):
            self.fail(f"the copy to the secondary has {data['status']}")
            self._wake.set()

    @staticmethod
    def _came(future: asyncio.Future[None]) -> None:
        if not future.done():
            future.set_result(None)

    async def reach(self, pace: int) -> Relay:
        """The way into the standby. Raises EngineError."""
        far, loop = await self.standby.reach(), asyncio.get_running_loop()

        def end(reason: str) -> None:
            if reason:
                with contextlib.suppress(RuntimeError):  # the loop has ended
                    loop.call_soon_threadsafe(self._broken, reason)

        return Relay(far, pace, end)

    def _broken(self, reason: str) -> None:
        if not self.moved.done():
            self.fail(reason)
            self._wake.set()
