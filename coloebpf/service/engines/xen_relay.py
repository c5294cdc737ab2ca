"""The service's side of a relay (coloebpf/xen/relay.py): found or started, given its connection, heard, ordered."""

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

from coloebpf.errors import EngineError
from coloebpf.xen.records import Mark
from coloebpf.xen.relay import PACKET

SOCKET, LOG = "relay.sock", "relay.log"
RUNE = (sys.executable, "-m", "coloebpf.xen.relay")
LOOK_S = 0.05
SAID = 400  # characters of xl's last words that an error repeats

OnMark = Callable[[Mark, bool], object]  # what was met, and whether it waits for a go()
OnOver = Callable[[str], object]  # why


class Relay:
    """`met`: how often each mark was met before this service came. `passed`: bytes of the guest that went by.

    `cut`: why the other host is not connected any more, "" if it is.
    """

    def __init__(self, connection: socket.socket, home: Path, on_mark: OnMark, on_cut: OnOver, on_over: OnOver) -> None:
        self._connection, self._home = connection, home
        self._on_mark, self._on_cut, self._on_over = on_mark, on_cut, on_over
        self.met: dict[Mark, int] = {}
        self.held: list[Mark] = []
        self.passed = 0
        self.cut = ""
        self.over: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._hearing: asyncio.Task[None] | None = None

    @classmethod
    async def find(cls, home: Path, on_mark: OnMark, on_cut: OnOver, on_over: OnOver) -> Relay | None:
        """One that runs; None if none does."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, str(home / SOCKET))
            hello = json.loads(await asyncio.get_running_loop().sock_recv(connection, PACKET))
        except (OSError, ValueError):
            connection.close()
            return None
        relay = cls(connection, home, on_mark, on_cut, on_over)
        relay.met = {Mark(mark): number for mark, number in hello["hello"].items()}
        relay.held, relay.passed, relay.cut = [Mark(mark) for mark in hello["held"]], hello["passed"], hello["cut"]
        return relay

    def listen(self) -> None:
        """From here on what it says is told."""
        self._hearing = asyncio.get_running_loop().create_task(self._hear())

    def start(self, net: socket.socket, colo: bool, **with_: object) -> None:
        """Gives it the connection to the other host, which is its own from here on. Raises EngineError."""
        order = json.dumps({"do": "start", "colo": colo, **with_}).encode()
        try:
            socket.send_fds(self._connection, [order], [net.fileno()])
        except OSError as e:
            raise EngineError(f"the relay is gone{last_words(self._home)}") from e

    def go(self, mark: Mark) -> None:
        """What it has kept back passes."""
        self._say(do="go", mark=mark)

    def checkpoint(self) -> None:
        """Asks libxl for one."""
        self._say(do="checkpoint")

    def end(self) -> None:
        """The stream ends: on the primary the guest goes on alone, on the secondary libxl makes the SVM the guest."""
        self._say(do="end")

    def kill(self) -> None:
        """Likewise, with xl killed first: on the secondary nobody takes over."""
        self._say(do="kill")

    async def let_go(self) -> None:
        """It goes on, for the next service."""
        if self._hearing is not None:
            self._hearing.cancel()
            await asyncio.gather(self._hearing, return_exceptions=True)
        self._connection.close()

    def _say(self, **what: object) -> None:
        with contextlib.suppress(OSError):  # it is gone, which is heard of
            self._connection.send(json.dumps(what).encode())

    async def _hear(self) -> None:
        why = "the relay is gone"
        while True:
            try:
                data = await asyncio.get_running_loop().sock_recv(self._connection, PACKET)
            except OSError:
                data = b""
            if not data:
                break
            said: dict[str, Any] = json.loads(data)
            if "mark" in said:
                self._on_mark(Mark(said["mark"]), said["held"])
            elif "passed" in said:
                self.passed = said["passed"]
            elif "cut" in said:
                self.cut = said["cut"]
                self._on_cut(self.cut)
            elif "error" in said:
                why = said["error"]
            elif "over" in said:
                why = said["over"] + last_words(self._home)
                break
        self._connection.close()
        self.over.set_result(why)
        self._on_over(why)


def last_words(home: Path) -> str:
    """What xl has said at its end."""
    with contextlib.suppress(OSError):
        if said := (home / LOG).read_text(errors="replace").strip()[-SAID:]:
            return f"; xl said: {said}"
    return ""


async def launch(home: Path, argv: Sequence[str]) -> asyncio.subprocess.Process:
    """A process that is, or starts, a relay at `home`. Raises EngineError."""
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o700)
        (home / SOCKET).unlink(missing_ok=True)
        with (home / LOG).open("wb") as log:
            return await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
    except OSError as e:
        raise EngineError(f"{argv[0]} can't be run: {e.strerror}") from e


async def arrives(
    home: Path, process: asyncio.subprocess.Process, seconds: float, on_mark: OnMark, on_cut: OnOver, on_over: OnOver
) -> Relay:
    """The relay that `process` is or starts. Raises EngineError if it does not come; the process has ended then."""
    try:
        async with asyncio.timeout(seconds):
            while process.returncode is None:
                if (relay := await Relay.find(home, on_mark, on_cut, on_over)) is not None:
                    return relay
                await asyncio.sleep(LOOK_S)
    except BaseException as e:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        if isinstance(e, TimeoutError):
            raise EngineError(f"xl did not begin in {seconds:g} s{last_words(home)}") from e
        raise
    raise EngineError(f"xl has ended with {process.returncode}{last_words(home)}")
