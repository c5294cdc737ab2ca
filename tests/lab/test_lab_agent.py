"""The process that serves a lab's hosts, with hosts that are made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coloebpf.lab.agent import EventLog, serve


class Host:
    """Notes what the agent does, in order."""

    def __init__(self, events: list[dict[str, Any]]) -> None:
        self._events = events
        self.calls: list[str] = []

    def events(self, timeout_s: float) -> list[dict[str, Any]]:
        assert timeout_s == 0
        self.calls.append("events")
        return self._events

    def sweep(self) -> None:
        self.calls.append("sweep")

    def kick(self) -> object:
        self.calls.append("kick")
        return 1


@pytest.mark.parametrize(
    ("kinds", "calls"),
    [
        ([], ["sweep", "events"]),
        (["divergence"], ["sweep", "events"]),
        (["kick"], ["sweep", "events", "kick"]),
        (["kick", "timeout", "kick"], ["sweep", "events", "kick"]),
    ],
)
def test_a_host_is_swept_and_kicked_once_when_it_asks(kinds: list[str], calls: list[str]) -> None:
    host = Host([{"kind": kind} for kind in kinds])
    events = serve("primary", host, now=lambda: 7.5)
    assert host.calls == calls
    assert events == [{"time": 7.5, "host": "primary", "kind": kind} for kind in kinds]


def test_events_are_lines_in_order(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl")
    log.write([{"kind": "divergence", "nic": 0}, {"kind": "kick"}])
    log.write([])
    log.write([{"kind": "timeout"}])
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == ["divergence", "kick", "timeout"]


def test_the_log_is_bounded_and_keeps_the_newest(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "events.jsonl", limit=1000)
    for number in range(1000):
        log.write([{"number": number}])
    files = sorted(tmp_path.iterdir())
    assert sum(path.stat().st_size for path in files) < 3 * 1000
    newest = [json.loads(line)["number"] for path in reversed(files) for line in path.read_text().splitlines()]
    assert newest == list(range(newest[0], 1000))
