"""What tests of the link share: certificates of all kinds, links that record what happens to them."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import Callable
from pathlib import Path

from coloebpf.service.peer.link import PeerLink
from coloebpf.service.peer.messages import Hello, Message, PairNote
from coloebpf.service.peer.pki import Identity, init_pki

LOOPBACK = "127.0.0.1"
PATIENCE = 10.0  # seconds for what takes milliseconds on an idle machine
LEASE_NS = 300_000_000


def identity(directory: Path, host: str) -> Identity:
    return Identity(directory / "ca.pem", directory / f"{host}.pem", directory / f"{host}.key")


def expired(directory: Path, *hosts: str) -> None:
    """Certificates that ended yesterday. (Their CA is good.)"""
    init_pki(directory, hosts, days=1, now=dt.datetime.utcnow() - dt.timedelta(days=2))


class Recorded:
    """A PeerLink, with all that its callbacks were told."""

    def __init__(
        self,
        name: str,
        peer: str,
        files: Identity,
        *,
        port: int = 0,
        connect: int = 0,
        session: bytes = b"",
        interval_s: float = 0.05,
        pairs: Callable[[], list[PairNote]] = list,
    ) -> None:
        self.events: list[tuple[str, object]] = []
        self._changed = asyncio.Event()
        self.link = PeerLink(
            name,
            peer,
            files,
            listen=(LOOPBACK, port),
            connect=(LOOPBACK, connect),
            session=session or name.encode().ljust(16, b"\0"),
            interval_s=interval_s,
            lease_ns=LEASE_NS,
            pairs=pairs,
            on_message=lambda message: self._note("message", message),
            on_up=lambda hello: self._note("up", hello),
            on_down=lambda reason: self._note("down", reason),
        )

    def _note(self, what: str, detail: object) -> None:
        self.events.append((what, detail))
        self._changed.set()

    def count(self, what: str) -> int:
        return sum(kind == what for kind, _ in self.events)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for the callbacks to bring it about."""
        async with asyncio.timeout(PATIENCE):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def up(self, times: int = 1) -> None:
        await self.until(lambda: self.count("up") >= times)

    async def down(self, times: int = 1) -> None:
        await self.until(lambda: self.count("down") >= times)

    @property
    def messages(self) -> list[Message]:
        return [detail for kind, detail in self.events if kind == "message"]  # type: ignore[misc]

    @property
    def hellos(self) -> list[Hello]:
        return [detail for kind, detail in self.events if kind == "up"]  # type: ignore[misc]


async def until(condition: Callable[[], bool]) -> None:
    """Polls for what no callback tells."""
    async with asyncio.timeout(PATIENCE):
        while not condition():
            await asyncio.sleep(0.01)
