"""The service's side of the workers (worker.py): one order at a time for each, and an end of those that hang."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from coloebpf.errors import XenError
from coloebpf.xen.worker import PACKET

ARGV = (sys.executable, "-m", "coloebpf.xen.worker")
END_S = 5.0  # for one whose socket was closed: it lets a guest go on that stands still, and ends
SAID = 300  # characters of a worker's last words that an error repeats


def _nothing(step: str) -> None:
    pass


class Worker:
    """One process. After any XenError of do() but a refusal it is dead."""

    def __init__(self, process: asyncio.subprocess.Process, service: socket.socket, log: Path) -> None:
        self._process, self._service, self._log = process, service, log
        self._busy = asyncio.Lock()

    @classmethod
    async def start(cls, log: Path, seconds: float, argv: Sequence[str] = ARGV) -> Worker:
        """Raises XenError if libxl can't be had on this host. It takes some 0.1 s when the machine is not busy."""
        mine, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            log.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            with its, log.open("wb") as words:
                process = await asyncio.create_subprocess_exec(
                    *argv, stdin=its.fileno(), stdout=words, stderr=words, start_new_session=True
                )
        except OSError as e:
            mine.close()
            raise XenError(f"no process for libxl can be started ({e})") from e
        mine.setblocking(False)
        worker = cls(process, mine, log)
        try:
            async with asyncio.timeout(seconds):
                await worker._answer(_nothing)
        except TimeoutError as e:
            await worker.kill()
            raise XenError(f"libxl did not begin in {seconds:g} s") from e
        except BaseException:
            await worker.kill()
            raise
        return worker

    @property
    def alive(self) -> bool:
        """It can be given orders."""
        return self._service.fileno() >= 0 and self._process.returncode is None

    async def do(
        self,
        order: str,
        seconds: float | None,
        fd: int | None = None,
        on_step: Callable[[str], object] = _nothing,
        **with_: object,
    ) -> Any:
        """Its answer. Raises XenError: what libxl says, or that there is no answer. Then, and if nobody waits any more,
        the worker is let go of."""
        async with self._busy:
            try:
                self._send(order, fd, with_)
                async with asyncio.timeout(seconds):
                    return await self._answer(on_step)
            except TimeoutError as e:
                self.let_go()
                await self.kill()
                raise XenError(f"libxl has not done {order!r} in {seconds:g} s") from e
            except asyncio.CancelledError:
                self.let_go()
                raise

    def go(self) -> None:
        """What a copy waits for."""
        with contextlib.suppress(OSError):
            self._service.send(b'{"do": "go"}')

    def let_go(self) -> None:
        """It ends by itself when it is through; a guest that stands still goes on."""
        self._service.close()

    async def end(self) -> None:
        """Likewise, of one that has no order; returns when it has ended."""
        self.let_go()
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    async def kill(self) -> None:
        """With the helpers that libxl has started. A guest that stands still, or is half restored, stays so."""
        if not self._busy.locked():  # else whoever waits for its answer hears of its end
            self.let_go()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await self._process.wait()

    def _send(self, order: str, fd: int | None, with_: dict[str, object]) -> None:
        data = json.dumps({"do": order, **with_}).encode()
        try:
            socket.send_fds(self._service, [data], [] if fd is None else [fd])
        except OSError as e:
            raise XenError(f"libxl's process is gone{self._words()}") from e

    async def _answer(self, on_step: Callable[[str], object]) -> Any:
        while True:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._service, PACKET)
            except OSError:
                data = b""
            if not data:
                self.let_go()
                await self.kill()
                raise XenError(f"libxl's process is gone{self._words()}")
            said = json.loads(data)
            if "step" in said:
                on_step(said["step"])
            elif "error" in said:
                raise XenError(said["error"] + self._words())
            else:
                return said["answer"]

    def _words(self) -> str:
        with contextlib.suppress(OSError):
            if said := self._log.read_text(errors="replace").strip()[-SAID:]:
                return f"; it said: {said}"
        return ""


class Libxl:
    """libxl for short orders: a worker that is started when it is needed, and again when it is gone."""

    def __init__(self, home: Path, name: str, start_s: float, argv: Sequence[str] = ARGV) -> None:
        self._home, self._name, self._start_s, self._argv = home, name, start_s, argv
        self._worker: Worker | None = None
        self._starting = asyncio.Lock()

    async def do(self, order: str, seconds: float, **with_: str | int) -> Any:
        """See Worker."""
        async with self._starting:
            if self._worker is None or not self._worker.alive:
                self._worker = await self.worker(self._name)
        return await self._worker.do(order, seconds, None, _nothing, **with_)

    async def worker(self, name: str) -> Worker:
        """One for a long order; the caller ends it."""
        return await Worker.start(self._home / f"{name}.log", self._start_s, self._argv)

    async def end(self) -> None:
        """No more orders."""
        if self._worker is not None:
            await self._worker.end()
