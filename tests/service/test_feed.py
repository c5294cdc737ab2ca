"""Findings that come faster than they can be looked at."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest

from coloebpf.service.comparer import Comparer, Finding, Walk
from coloebpf.service.feed import EVENTS, MOST_UNSEEN, Feed
from tests.service.test_comparer import event

ROUNDS = 2 * MOST_UNSEEN // EVENTS


class Control:
    """A ring buffer that is full for ROUNDS reads. Its descriptor is a pipe."""

    def __init__(self) -> None:
        self.ours, self.its = os.pipe()
        os.write(self.its, b"x")
        self.rounds, self.empty = 0, asyncio.Event()

    def events_fd(self) -> int:
        return self.ours

    def events(self, most: int) -> list[dict[str, Any]]:
        self.rounds += 1
        if self.rounds == ROUNDS:
            os.read(self.ours, 1)
            self.empty.set()
        return [event()] * most


def test_a_storm_of_findings_is_looked_at_at_once_and_takes_bounded_room(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        control, looks = Control(), list[int]()

        def look(findings: Sequence[Finding]) -> list[Finding]:
            looks.append(len(findings))
            return list(findings)

        pairs = SimpleNamespace(of_nic=lambda nic: SimpleNamespace(number=3), all=list)
        comparer = cast(Comparer, SimpleNamespace(look=look))
        feed = Feed(cast(Any, control), comparer, cast(Walk, None), cast(Any, None), cast(Any, pairs))
        feed.start()
        await control.empty.wait()
        looking = asyncio.create_task(feed.look())
        async with asyncio.timeout(5):
            while not feed.findings:
                await asyncio.sleep(0.01)
        looking.cancel()
        feed.stop()
        os.close(control.ours)
        os.close(control.its)
        assert looks == [MOST_UNSEEN]
        assert feed.findings[3]["payload"] == MOST_UNSEEN
        assert f"lost={ROUNDS * EVENTS - MOST_UNSEEN}" in caplog.text

    asyncio.run(run())
