"""One live copy of the PVM by libxl, from the primary's side: into a standby, with the PVM stopped at its end."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable

from coloebpf.errors import EngineError
from coloebpf.service.engines.standby import Standby
from coloebpf.xen.client import Worker
from coloebpf.xen.hold import Hold

MIB = 1 << 20
BYTES_ACKED = struct.Struct("=120xQ")  # tcpi_bytes_acked in struct tcp_info, linux/tcp.h

Told = Callable[["Copy"], object]


class Copy:
    """What is known of it. `on_stopped` is called when the PVM stands still, and all but its rest is written;
    `on_written` when all is: the PVM goes on when that returns. `hold`: nobody wants it yet, so it goes on until
    hurry().
    """

    def __init__(self, standby: Standby, on_stopped: Told, on_written: Told, hold: Hold | None = None) -> None:
        loop = asyncio.get_running_loop()
        self.standby, self.number = standby, standby.number
        self._on_stopped, self._on_written = on_stopped, on_written
        self.refused = ""  # why no copy of this guest makes sense
        self.switching = False  # the secondary was told that the checkpoint comes
        self.suspended = False  # that the PVM stands still was told
        self._stopped, self._whole, self._wanted = (loop.create_future() for _ in range(3))
        self._hold = hold
        self._stream: socket.socket | None = None
        self._worker: Worker | None = None
        self._broken = ""

    def heard(self, word: str, detail: str) -> None:
        """The secondary has said something of it."""
        if word == "whole" and not self._whole.done():
            self._whole.set_result(None)
        elif word == "lost":
            self.fail(detail)

    def fail(self, reason: str) -> None:
        """It comes to nothing. libxl notices at its connection's end, and lets the PVM go on."""
        self._broken = self._broken or reason
        if self._hold is not None:
            with contextlib.suppress(OSError):  # then libxl is ended in write()
                self._hold.end()
        self._want()
        if not self._whole.done():
            self._whole.set_exception(EngineError(reason))
            self._whole.exception()  # nobody need look at it
        if self._stream is not None:
            with contextlib.suppress(OSError):
                self._stream.shutdown(socket.SHUT_RDWR)

    @property
    def kept(self) -> bool:
        """It goes on until it is wanted."""
        return self._hold is not None and not self._wanted.done()

    def hurry(self) -> None:
        """It is wanted now: the PVM is to be stopped."""
        if self._hold is not None and self.kept:
            try:
                self._hold.go()
            except OSError as e:
                self.fail(f"{self._hold.path}.go can't be made: {e.strerror}")
            self._want()

    def _want(self) -> None:
        if not self._wanted.done():
            self._wanted.set_result(None)

    async def write(self, worker: Worker, domid: int, copy_s: float, step_s: float) -> None:
        """Returns when the PVM goes on and all is written. Raises EngineError; then the PVM may stand still."""
        self._worker = worker
        self._stream = await self.standby.reach()
        with self._stream as stream:
            if self._broken:
                raise EngineError(self._broken)
            stream.setblocking(True)
            limit_s, how = self._manner(copy_s + 3 * step_s)
            order = asyncio.get_running_loop().create_task(
                worker.do("copy", limit_s, stream.fileno(), self._step, domid=domid, **how)
            )
            try:
                if self.kept:
                    await asyncio.wait((order, self._stopped, self._wanted), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait((order, self._stopped), timeout=copy_s, return_when=asyncio.FIRST_COMPLETED)
                if not order.done() and not self._stopped.done():
                    self.fail(f"the PVM did not come to a standstill in {copy_s:g} s")
                await asyncio.wait((order,), timeout=step_s)
                if not order.done():
                    self.fail(f"libxl was not through with the PVM's rest in {step_s:g} s")
                    await worker.kill()
                    await asyncio.wait((order,))
            except asyncio.CancelledError:
                self.fail("given up")
                order.cancel()  # the worker is let go of, and lets the PVM go on
                await asyncio.wait((order,))
                raise
        if (error := order.exception()) is not None and not self._broken:
            raise error
        if self._broken:
            raise EngineError(self._broken)

    def _manner(self, limit_s: float) -> tuple[float | None, dict[str, object]]:
        """How long libxl may take for all of it, and what it has to know."""
        if self._hold is None:
            return limit_s, {}
        try:
            self._hold.begin()
            if self._wanted.done():  # meanwhile
                self._hold.go()
        except OSError as e:
            raise EngineError(f"{self._hold.path} can't be written: {e.strerror}") from e
        return None, {"hold": str(self._hold.path), "library": str(self._hold.library)}

    @property
    def progress(self) -> str:
        """How far it is, for people."""
        if self._stream is None:
            return "the copy begins"
        if self._stream.fileno() < 0:  # all is written
            return "the other host restores the guest's memory"
        ahead = ", ahead of the next checkpoint" if self.kept else ""
        if self._stream.family == socket.AF_UNIX:  # to the process that encrypts it
            return f"the guest's memory is on its way{ahead}"
        said = self._stream.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, BYTES_ACKED.size)
        return f"{BYTES_ACKED.unpack(said)[0] // MIB} MiB of the guest's memory have arrived{ahead}"

    async def whole(self, seconds: float) -> None:
        """Returns when the standby has all of it. Raises EngineError."""
        try:
            async with asyncio.timeout(seconds):
                await asyncio.shield(self._whole)
        except TimeoutError as e:
            raise EngineError(f"the standby has not got the whole state in {seconds:g} s") from e

    def _step(self, step: str) -> None:
        if not self._stopped.done():
            self._stopped.set_result(None)
        if not self._broken:
            self._on_stopped(self) if step == "stopped" else self._on_written(self)
        if step == "written":
            assert self._worker is not None
            self._worker.go()
