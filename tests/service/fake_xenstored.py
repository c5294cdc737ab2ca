"""A stand-in for xenstored on a Unix socket: nodes, watches, and what libxl does to them when domains come and go."""

from __future__ import annotations

import asyncio
import contextlib
import struct
from pathlib import Path

DIRECTORY, READ, WATCH, UNWATCH, EVENT, ERROR = 1, 2, 4, 5, 15, 16


class FakeXenstored:
    """`nodes`: values by path. `requests`: kind and first word of each, in order. `deaf`: it answers nothing."""

    def __init__(self, socket: Path) -> None:
        self._socket = socket
        self.nodes: dict[str, str] = {"/local": "", "/local/domain": ""}
        self.requests: list[tuple[int, str]] = []
        self.deaf = False
        self._watches: list[tuple[asyncio.StreamWriter, str, str]] = []
        self.connections: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        self._socket.parent.mkdir(parents=True, exist_ok=True)
        self._server = await asyncio.start_unix_server(self._serve, self._socket)

    async def stop(self) -> None:
        """As when it is killed; nodes stay, for the test's next start()."""
        assert self._server is not None
        self._server.close()
        for writer in tuple(self.connections):
            writer.close()
        self._socket.unlink(missing_ok=True)

    # ---- what libxl and the hypervisor do --------------------------------------------------------------------------

    def come(self, domid: int, name: str, mac: str = "") -> None:
        """A domain is created."""
        self.write(f"/local/domain/{domid}/name", name)
        self.fire("@introduceDomain")
        if mac:
            self.write(f"/local/domain/0/backend/vif/{domid}/0/mac", mac)

    def rename(self, domid: int, name: str) -> None:
        self.write(f"/local/domain/{domid}/name", name)

    def end(self, domid: int) -> None:
        """It is destroyed."""
        for path in [path for path in self.nodes if f"{path}/".startswith(f"/local/domain/{domid}/")]:
            del self.nodes[path]
        self.fire(f"/local/domain/{domid}")
        self.fire("@releaseDomain")

    def write(self, path: str, value: str) -> None:
        """With the nodes above."""
        above = path
        while above := above.rpartition("/")[0]:
            self.nodes.setdefault(above, "")
        self.nodes[path] = value
        self.fire(path)

    def fire(self, path: str) -> None:
        """An event for each watch at or above; of a removal, for those below too, with their own path."""
        for writer, watched, token in self._watches:
            if f"{path}/".startswith(f"{watched}/"):
                self._send(writer, EVENT, 0, f"{path}\0{token}\0".encode())
            elif path not in self.nodes and watched.startswith(f"{path}/"):
                self._send(writer, EVENT, 0, f"{watched}\0{token}\0".encode())

    # ---- the protocol ----------------------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, number, transaction, length = struct.unpack("<IIII", await reader.readexactly(16))
                assert transaction == 0
                body = (await reader.readexactly(length)).decode()
                assert body.endswith("\0")
                words = body[:-1].split("\0")
                self.requests.append((kind, words[0]))
                if not self.deaf:
                    self._answer(writer, kind, number, words)
        self.connections.discard(writer)
        self._watches = [watch for watch in self._watches if watch[0] is not writer]
        writer.close()

    def _answer(self, writer: asyncio.StreamWriter, kind: int, number: int, words: list[str]) -> None:
        path = words[0]
        match kind:
            case 1 | 2 if path not in self.nodes:
                self._send(writer, ERROR, number, b"ENOENT\0")
            case 1:
                below = [other[len(path) + 1 :] for other in self.nodes if other.startswith(f"{path}/")]
                names = sorted({name.partition("/")[0] for name in below})
                self._send(writer, kind, number, "".join(f"{name}\0" for name in names).encode())
            case 2:
                self._send(writer, kind, number, self.nodes[path].encode())  # without a NUL, as the real one
            case 4:
                self._watches.append((writer, path, words[1]))
                self._send(writer, kind, number, b"OK\0")
                self._send(writer, EVENT, 0, f"{path}\0{words[1]}\0".encode())
            case 5 if (writer, path, words[1]) in self._watches:
                self._watches.remove((writer, path, words[1]))
                self._send(writer, kind, number, b"OK\0")
            case _:
                self._send(writer, ERROR, number, b"EINVAL\0")

    def _send(self, writer: asyncio.StreamWriter, kind: int, number: int, body: bytes) -> None:
        writer.write(struct.pack("<IIII", kind, number, 0, len(body)) + body)
