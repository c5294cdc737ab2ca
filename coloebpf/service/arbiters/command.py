"""The arbiter that makes sure: a command that turns the other host off, such as stonith_admin or a fence agent.

Exit code 0 means that the other host is off. Then there is no one left to speak, so the grant has no end, and lock-step
needs no leases. Anything else says nothing: the pair goes on holding, and the command is run again after a pause.

The command concerns the whole host. Pairs that ask while it runs, or just after it, share that run, and there is never
a second one at the same time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
from collections.abc import Callable

from coloebpf.errors import ArbiterError
from coloebpf.service.arbiters.base import NS_PER_S, Grant, Protected, Refusal
from coloebpf.service.config import CommandConfig
from coloebpf.service.log import say

log = logging.getLogger(__name__)

PAUSE_FIRST_S, PAUSE_LAST_S = 1.0, 30.0  # seconds between tries; fencing devices don't like to be hammered
SHARED_NS = 2 * NS_PER_S  # pairs of a lost host ask within some ms of each other; nothing boots in that time
OUTPUT_BYTES = 16_384  # of the command's that are logged
DRAIN_S = 1.0  # seconds for the output of a command that has ended: something it left behind may hold the pipe


class CommandArbiter:
    """Fencing by `config.fence`."""

    name, promotes, leased = "command", True, False

    def __init__(self, config: CommandConfig, clock: Callable[[], int]) -> None:
        self._command, self._timeout = config.fence, config.timeout_s
        self._clock = clock
        self._run: asyncio.Task[bool] | None = None
        self._fenced_ns: int | None = None
        self.runs = self.failures = 0

    async def check(self) -> None:
        """Raises ArbiterError if the command can't be run at all."""
        if shutil.which(self._command[0]) is None:
            raise ArbiterError(f"fencing command {self._command[0]} is no program that can be run")

    async def begin(self, pair: Protected) -> None:
        return None

    async def acquire(self, pair: Protected) -> Grant | Refusal:
        pause = PAUSE_FIRST_S
        while not await self._fenced():
            await asyncio.sleep(pause)
            pause = min(2 * pause, PAUSE_LAST_S)
        say(log, logging.WARNING, "the other host is off", pair=pair.name)
        return Grant()

    async def renew(self, pair: Protected, seconds: int = 0) -> Grant | Refusal:
        return Grant()

    async def release(self, pair: Protected) -> Grant | Refusal:
        return Grant()

    async def close(self) -> None:
        """A command that runs is left to itself: half a fencing is worse than one that nobody waits for."""

    async def _fenced(self) -> bool:
        if self._fenced_ns is not None and self._clock() - self._fenced_ns < SHARED_NS:
            return True
        if self._run is None or self._run.done():
            self._run = asyncio.get_running_loop().create_task(self._fence())
        return await asyncio.shield(self._run)  # who no longer waits does not stop it

    async def _fence(self) -> bool:
        """One run; True if the other host is off."""
        self.runs += 1
        say(log, logging.WARNING, "fencing the other host", command=" ".join(self._command), timeout_s=self._timeout)
        # A pipe of our own: asyncio's would make wait() wait for whatever the command leaves behind with its output.
        ours, its = os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=its,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # so that a timeout ends what it has started, too
            )
        except OSError as e:
            os.close(ours)
            return self._failed(f"can't be run: {e.strerror}")
        finally:
            os.close(its)
        reading = asyncio.get_running_loop().create_task(_logged(ours))
        try:
            async with asyncio.timeout(self._timeout):
                code = await process.wait()
        except TimeoutError:
            code = None
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
        await asyncio.wait((reading,), timeout=DRAIN_S)
        reading.cancel()
        if code is None:
            return self._failed(f"took longer than {self._timeout} s and was killed")
        if code != 0:
            return self._failed(f"exit code {code}")
        self._fenced_ns = self._clock()
        return True

    def _failed(self, how: str) -> bool:
        self.failures += 1
        say(log, logging.ERROR, "fencing failed, the pairs go on holding", command=self._command[0], how=how)
        return False


async def _logged(pipe: int) -> None:
    """Every line of the command's, up to a bound; what is beyond is read, so that the command does not block on it."""
    loop = asyncio.get_running_loop()
    output = asyncio.StreamReader()
    transport, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), os.fdopen(pipe, "rb", 0))
    said = 0
    try:
        while chunk := await output.read(OUTPUT_BYTES):
            for line in chunk[: max(0, OUTPUT_BYTES - said)].decode(errors="replace").splitlines():
                say(log, logging.WARNING, "fencing command says", text=line)
            said += len(chunk)
    finally:
        transport.close()
