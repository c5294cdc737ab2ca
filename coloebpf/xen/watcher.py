"""When to look at a host's domains: xenstored tells of those that come, end, shut down, or get another name.

xenstored says that something is different; what that is libxl says, for not all of it is in xenstore. One watcher
serves all pairs. Without a xenstored they look as often as they like, until it is there again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Collection, Hashable
from pathlib import Path

from coloebpf.errors import XenError
from coloebpf.service.log import say
from coloebpf.xen.store import SOCKET, Store

# The second is for domains that end, and for those that crash, shut down, or are suspended.
EVENTS = ("@introduceDomain", "@releaseDomain")
DOMAINS = "/local/domain"
BACKENDS = "/local/domain/0/backend/vif"
RETRY_S = 1.0  # between two tries to reach a xenstored
NET_S = 5.0  # between two looks without an event: a net under what is told
GAP_S = 0.2  # between two looks at least: COLO's checkpoints make events too

logger = logging.getLogger("coloebpf.xen")


def _name(domid: str) -> str:
    return f"{DOMAINS}/{domid}/name"


class Watcher:
    """`up`: it tells of changes now. It works while it has a Watch that was not ended."""

    def __init__(self, socket: Path = SOCKET, net_s: float = NET_S) -> None:
        self._socket, self.net_s = socket, net_s
        self.up = False
        self._store: Store | None = None
        self._watches: set[Watch] = set()
        self._following: set[str] = set()  # domains whose names are watched
        self._event = asyncio.Event()
        self._complaint = ""
        self._running: asyncio.Task[None] | None = None

    def watch(self) -> Watch:
        """For one pair."""
        watch = Watch(self)
        self._watches.add(watch)
        return watch

    def run(self) -> None:
        """Called by a Watch that is used for the first time."""
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())

    async def end(self, watch: Watch) -> None:
        """With the last one the connection ends."""
        self._watches.discard(watch)
        if not self._watches and self._running is not None:
            running, self._running = self._running, None
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    async def domids(self, macs: Collection[str]) -> list[int]:
        """Domains that have a NIC with one of these addresses. Raises XenError, also when there is no xenstored."""
        if (store := self._store) is None:
            raise XenError("there is no xenstored")
        found = []
        for domid in await store.children(BACKENDS):
            for nic in await store.children(f"{BACKENDS}/{domid}"):
                mac = await store.read(f"{BACKENDS}/{domid}/{nic}/mac")
                if mac is not None and mac.lower() in macs:
                    found.append(int(domid))
                    break
        return found

    async def _run(self) -> None:
        while True:
            try:
                self._store = await Store.connect(self._socket, self._on_event)
                await self._serve(self._store)
            except XenError as e:
                if str(e) != self._complaint:
                    say(logger, logging.WARNING, "domains are looked at by the clock", period_s=GAP_S, error=e)
                self._complaint = str(e)
            finally:
                self.up = False
                if self._store is not None:
                    await self._store.close()
                    self._store = None
                self._following.clear()
                self._tell()
            await asyncio.sleep(RETRY_S)

    async def _serve(self, store: Store) -> None:
        """Raises XenError when that is over."""
        for path in EVENTS:
            await store.watch(path)
        while True:
            self._event.clear()
            await self._follow(store)
            if not self.up:
                self.up, self._complaint = True, ""
                say(logger, logging.INFO, "xenstored tells of changes")
            event = asyncio.ensure_future(self._event.wait())
            try:
                await asyncio.wait((event, store.closed), return_when=asyncio.FIRST_COMPLETED)
            finally:
                event.cancel()

    async def _follow(self, store: Store) -> None:
        """A watch on all of /local/domain would tell of each device's each step."""
        there = set(await store.children(DOMAINS))
        for domid in there - self._following:
            await store.watch(_name(domid))
        for domid in self._following - there:
            with contextlib.suppress(XenError):
                await store.unwatch(_name(domid))
        self._following = there

    def _on_event(self, path: str) -> None:
        self._event.set()
        self._tell()

    def _tell(self) -> None:
        for watch in self._watches:
            watch.again()


class Watch:
    """What one pair's engine knows of changes."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher = watcher
        self._changed = asyncio.Event()
        self._changed.set()
        self._looked_s = 0.0
        self._circumstances: tuple[Hashable, ...] = ()

    def due(self, *circumstances: Hashable) -> bool:
        """Whether it is time to look, which whoever asks does then; also if `circumstances` have changed since."""
        self._watcher.run()
        now = asyncio.get_running_loop().time()
        due = (
            not self._watcher.up
            or self._changed.is_set()
            or now - self._looked_s >= self._watcher.net_s
            or circumstances != self._circumstances
        )
        if due:
            self._changed.clear()
            self._looked_s, self._circumstances = now, circumstances
        return due

    def again(self) -> None:
        """It is: something has changed, or the last look saw nothing."""
        self._changed.set()

    async def wait(self, seconds: float) -> None:
        """So long, or until something has changed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._changed.wait()
                await asyncio.sleep(self._looked_s + GAP_S - asyncio.get_running_loop().time())

    async def domids(self, macs: Collection[str]) -> list[int]:
        """See Watcher; none if nobody can say."""
        try:
            return await self._watcher.domids(macs)
        except XenError:
            return []

    async def end(self) -> None:
        """No more."""
        await self._watcher.end(self)
