"""A host's domains as libxl has them: looked at, and given short orders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coloebpf.xen.client import ARGV, Libxl, Worker
from coloebpf.xen.libxl import Domain
from coloebpf.xen.watcher import Watcher


class Toolstack:
    """`name`: of the guest in xl; `step_s`, `end_s`: for an order, for a domain's end. Its methods raise XenError.

    `changes`: when to look.
    """

    def __init__(
        self,
        pair: str,
        name: str,
        home: Path,
        step_s: float,
        end_s: float,
        watcher: Watcher,
        argv: Sequence[str] = ARGV,
    ) -> None:
        self.pair, self.domain, self.home = pair, name, home
        self.changes = watcher.watch()
        self._step_s, self._end_s = step_s, end_s
        self._libxl = Libxl(home, "orders", step_s, argv)
        # An end takes seconds, and a start may not wait for it.
        self._slow = Libxl(home, "ends", step_s, argv)

    async def all(self) -> list[Domain]:
        """Of this host."""
        return [Domain(**domain) for domain in await self._libxl.do("domains", self._step_s)]

    async def named(self, name: str) -> Domain | None:
        """The one of that name."""
        return next((domain for domain in await self.all() if domain.name == name), None)

    async def numbered(self, domid: int) -> Domain | None:
        """The one of that number."""
        return next((domain for domain in await self.all() if domain.domid == domid), None)

    async def guest(self) -> Domain | None:
        """The one that has the guest's own name."""
        return await self.named(self.domain)

    async def configuration(self, domid: int) -> str:
        """Its libxl_domain_config, in JSON."""
        return str(await self._libxl.do("configuration", self._step_s, domid=domid))

    async def worker(self, name: str) -> Worker:
        """For a copy; the caller ends it."""
        return await self._libxl.worker(name)

    async def do(self, order: str, domid: int) -> None:
        """resume, pause or unpause."""
        await self._libxl.do(order, self._step_s, domid=domid)

    async def rename(self, domid: int, old: str, new: str) -> None:
        """Nobody else may have the new name."""
        await self._libxl.do("rename", self._step_s, domid=domid, old=old, new=new)

    async def destroy(self, domid: int) -> None:
        """It is gone when this returns."""
        await self._slow.do("destroy", self._end_s, domid=domid)

    async def end(self) -> None:
        """Lets go of libxl."""
        await self.changes.end()
        await self._libxl.end()
        await self._slow.end()
