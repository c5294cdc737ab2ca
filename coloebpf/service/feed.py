"""What the programs tell, brought to the pairs at once: events of the ring buffer, and the walk for what is late."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Protocol

from coloebpf.control import Control
from coloebpf.errors import ColoError
from coloebpf.service.announce import AddressBook
from coloebpf.service.comparer import Comparer, Finding, Walk, finding_of
from coloebpf.service.log import say
from coloebpf.service.primary import Primary
from coloebpf.service.secondary import Secondary
from coloebpf.service.status import FINDINGS

log = logging.getLogger("coloebpf.feed")

EVENTS = 256  # that are taken in one go, some 2 ms; the rest comes in the loop's next round
MOST_UNSEEN = 8192  # findings that wait for a look, some 5 MB; a storm brings them faster than they can be looked at
LOOK_AFTER_S = 0.01  # a thread that runs would hold up the request that has just been decided on
REST = 3  # times what the last walk took: with 100,000 flows that is more than its period would leave
BOOK_FLOWS = 64  # flows in which a walk looks for the SVMs' addresses: some 0.3 ms


class Pairs(Protocol):
    """Who is told."""

    def of_nic(self, nic: int) -> Primary | Secondary | None: ...
    def all(self) -> Iterable[Primary | Secondary]: ...


class Feed:
    """Reads one host's events from start() to stop(). `findings`: by pair's number and class, since the start."""

    def __init__(self, control: Control, comparer: Comparer, walk: Walk, book: AddressBook, pairs: Pairs) -> None:
        self.findings: dict[int, dict[str, int]] = {}
        self._unseen: list[Finding] = []
        self._lost = 0
        self._any = asyncio.Event()
        self._control, self._comparer, self._walk, self._book, self._pairs = control, comparer, walk, book, pairs

    def start(self) -> None:
        asyncio.get_running_loop().add_reader(self._control.events_fd(), self._readable)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self._control.events_fd())

    def _readable(self) -> None:
        """The request for a checkpoint comes first: the digests that the event brought were compared for it already."""
        events = self._control.events(most=EVENTS)
        findings = [finding for finding in map(finding_of, events) if finding is not None]
        for finding in findings:
            pair = self._pairs.of_nic(finding.nic)
            if isinstance(pair, Primary):
                pair.found(finding)
        if len(findings) < len(events):
            self._control.kick()
        if findings:
            room = MOST_UNSEEN - len(self._unseen)
            self._unseen.extend(findings[:room])
            self._lost += max(0, len(findings) - room)
            self._any.set()

    async def look(self) -> None:
        """Reads both sides' records of what was found, logs and counts it. In a thread, for the table is large."""
        while True:
            await self._any.wait()
            await asyncio.sleep(LOOK_AFTER_S)
            findings, self._unseen, lost, self._lost = self._unseen, [], self._lost, 0
            self._any.clear()
            if lost:
                say(log, logging.WARNING, "more findings than can be remembered, they are not counted", lost=lost)
            try:
                seen = await asyncio.to_thread(self._comparer.look, findings)
            except (ColoError, OSError) as e:
                say(log, logging.ERROR, "the records of a difference could not be read", error=e)
                continue
            for finding in seen:
                pair = self._pairs.of_nic(finding.nic)
                if pair is not None and finding.reason in FINDINGS:
                    counts = self.findings.setdefault(pair.number, dict.fromkeys(FINDINGS, 0))
                    counts[finding.reason] += 1

    async def walk(self, period_s: Callable[[], float]) -> None:
        """One round after the other; what goes wrong in one is said, and the next one tries again."""
        while True:
            await asyncio.sleep(max(period_s(), REST * self._walk.took_ns / 1e9))
            try:
                room = await self._walk.round()
                pairs = list(self._pairs.all())
                if room.low:
                    for pair in pairs:
                        if isinstance(pair, Primary):
                            pair.room_is_low()
                if any(isinstance(pair, Secondary) for pair in pairs):
                    self._book.look(BOOK_FLOWS)
            except (ColoError, OSError) as e:
                say(log, logging.ERROR, "the maps could not be walked", error=e)
