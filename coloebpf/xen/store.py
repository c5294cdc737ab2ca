"""A client of xenstored: reads, lists and watches over its socket, on the event loop.

Written from Xen's docs/misc/xenstore.txt and xen/include/public/io/xs_wire.h. Not `xen.lowlevel.xs`: a C extension in a
private directory of one version of xen-utils (/usr/lib/xen-4.17), whose calls block. Not pyxs: no release since 2016,
not in Debian, and it needs a thread. Four of the protocol's requests are all that is needed here, and they are the same
with each xenstored (C, OCaml, stub domain).
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import struct
from collections.abc import Callable
from enum import IntEnum
from pathlib import Path

from coloebpf.errors import XenError

SOCKET = Path("/run/xenstored/socket")
ANSWER_S = 5.0  # for an answer, which takes xenstored less than a millisecond
HEAD = struct.Struct("=IIII")  # struct xsd_sockmsg: type, request, transaction, length of what follows
MAX_BODY = 4096  # XENSTORE_PAYLOAD_MAX
NONE = "ENOENT"


class Kind(IntEnum):
    """enum xsd_sockmsg_type, as far as it is used."""

    DIRECTORY = 1
    READ = 2
    WATCH = 4
    UNWATCH = 5
    WATCH_EVENT = 15
    ERROR = 16


class Refused(XenError):
    """xenstored's own word for what is wrong: ENOENT, say."""

    def __init__(self, what: str, word: str) -> None:
        super().__init__(f"xenstored refuses {what}: {word}")
        self.word = word


class Store:
    """One connection. `closed` is done when it is over. `on_event`: told the path of each event."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, on_event: Callable[[str], object]
    ) -> None:
        self._reader, self._writer, self._on_event = reader, writer, on_event
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[tuple[int, bytes]]] = {}
        self.closed = asyncio.get_running_loop().create_task(self._hear())

    @classmethod
    async def connect(cls, path: Path, on_event: Callable[[str], object]) -> Store:
        """Raises XenError if no xenstored is there."""
        try:
            return cls(*await asyncio.open_unix_connection(path), on_event)
        except OSError as e:
            raise XenError(f"no xenstored answers at {path}: {e.strerror}") from e

    async def read(self, path: str) -> str | None:
        """A node's value; None if there is no such node. Raises XenError, as all of these."""
        try:
            return (await self._ask(Kind.READ, path)).decode(errors="replace")
        except Refused as e:
            if e.word == NONE:
                return None
            raise

    async def children(self, path: str) -> list[str]:
        """Names of what is directly below a node; none if there is no such node."""
        try:
            names = await self._ask(Kind.DIRECTORY, path)
        except Refused as e:
            if e.word == NONE:
                return []
            raise
        return [name.decode(errors="replace") for name in names.split(b"\0") if name]

    async def watch(self, path: str) -> None:
        """An event follows at once, and one for each change at or below `path`, which may be @introduceDomain, say."""
        await self._ask(Kind.WATCH, f"{path}\0{path}\0")

    async def unwatch(self, path: str) -> None:
        """Of a path that is watched."""
        await self._ask(Kind.UNWATCH, f"{path}\0{path}\0")

    async def close(self) -> None:
        """No more."""
        self.closed.cancel()
        await asyncio.gather(self.closed, return_exceptions=True)

    async def _ask(self, kind: Kind, body: str) -> bytes:
        if self.closed.done():
            raise XenError("xenstored is gone")
        number = next(self._numbers)
        data = body.encode() + (b"\0" if not body.endswith("\0") else b"")
        answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            self._writer.write(HEAD.pack(kind, number, 0, len(data)) + data)
            async with asyncio.timeout(ANSWER_S):
                said, value = await answer
        except TimeoutError as e:
            raise XenError(f"xenstored has not answered in {ANSWER_S:g} s") from e
        finally:
            self._waiting.pop(number, None)
        if said == Kind.ERROR:
            raise Refused(f"{kind.name} {body.partition(chr(0))[0]}", value.rstrip(b"\0").decode(errors="replace"))
        return value

    async def _hear(self) -> None:
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while True:
                    kind, number, _, length = HEAD.unpack(await self._reader.readexactly(HEAD.size))
                    if length > MAX_BODY:
                        break
                    self._heard(kind, number, await self._reader.readexactly(length))
        finally:
            self._writer.close()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(XenError("xenstored is gone"))

    def _heard(self, kind: int, number: int, body: bytes) -> None:
        if kind == Kind.WATCH_EVENT:
            self._on_event(body.partition(b"\0")[0].decode(errors="replace"))
        elif (answer := self._waiting.get(number)) is not None and not answer.done():
            answer.set_result((kind, body))
