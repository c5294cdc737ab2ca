"""From events to findings: classes, the second comparison, bounded bursts, and the walk in parts."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from coloebpf.model import REASONS
from coloebpf.service.comparer import CLASS_OF, CLASSES, DETAILS, Comparer, Finding, Walk, finding_of, looked_up
from coloebpf.service.records import FlowRecords, Record, Room

A, B = "00000000000000aa", "00000000000000bb"
FLOW = {"proto": 6, "guest": "10.0.0.1", "guest_port": 80, "remote": "10.0.0.9", "remote_port": 5000, "vlans": []}
ROOM = Room(slots=100, slots_free=100, flows=100, flows_free=100)
DATA, DATAGRAM, SYN = 1, 5, 2


def event(kind: str = "divergence", reason: str = "payload", **more: Any) -> dict[str, Any]:
    usual = {"kind": kind, "reason": reason, "time_ns": 5_000, "nic": 1, "epoch": 3, "offset": 77, "pvm_digest": A, "svm_digest": B, "flow_number": 9, "flow": FLOW}  # fmt: skip
    return usual | more


def finding(kind: str = "divergence", reason: str = "payload", **more: Any) -> Finding:
    found = finding_of(event(kind, reason, **more))
    assert found is not None
    return found


def record(digest: int = 1, start: int = 0, end: int = 10, kind: int = DATA, epoch: int = 3) -> Record:
    return Record(kind, digest, 0, start, end, epoch)


def records(pvm: Record | None, svm: Record | None) -> FlowRecords:
    return FlowRecords(int(pvm is not None), int(svm is not None), pvm, svm)


class FakeReader:
    """Maps that hold what a test says."""

    def __init__(self, found: FlowRecords | None = None, room: Room = ROOM) -> None:
        self.found, self._room, self.asked = found, room, 0

    def flows(self, numbers: Iterable[int]) -> dict[int, FlowRecords | None]:
        self.asked += 1
        return dict.fromkeys(numbers, self.found)

    def room(self) -> Room:
        return self._room


def test_every_reason_of_the_programs_has_a_class() -> None:
    assert set(CLASS_OF) == set(REASONS)
    assert set(CLASS_OF.values()) == set(CLASSES)


@pytest.mark.parametrize(
    ("told", "reason", "confirmed"),
    [
        (event(), "payload", True),
        (event(svm_digest=A), "payload", False),
        (event(reason="datagram"), "payload", True),
        (event(reason="fin"), "length", True),
        (event(reason="fin", svm_digest=A), "length", False),
        (event(reason="rst", svm_digest=A), "flags", True),
        (event(reason="options", svm_digest=A), "flags", True),
        (event(reason="structure", svm_digest=A), "structure", True),
        (event(reason="99"), "structure", True),  # of newer programs
        (event("timeout", "missing_on_svm", svm_digest=A), "missing_on_svm", True),
        (event("high_water", "no_slot", svm_digest=A), "no_slot", True),
    ],
)
def test_what_an_event_says_by_itself(told: dict[str, Any], reason: str, confirmed: bool) -> None:
    found = finding_of(told)
    assert found is not None
    assert (found.reason, found.confirmed) == (reason, confirmed)


def test_a_kick_is_no_finding() -> None:
    assert finding_of(event("kick")) is None


@pytest.mark.parametrize(
    ("flow", "text"),
    [
        ({}, "6:10.0.0.1:80-10.0.0.9:5000"),
        ({"vlans": [7, 9]}, "6:10.0.0.1:80-10.0.0.9:5000@7@9"),
        ({"guest": "fd00::1", "remote": "::"}, "6:fd00::1:80-:::5000"),
    ],
)
def test_a_flow_in_a_word(flow: dict[str, Any], text: str) -> None:
    assert finding(flow=FLOW | flow).flow == text


@pytest.mark.parametrize(
    ("first", "flow", "reason", "confirmed"),
    [
        # the flow went on, or nothing is left of it
        (finding(), None, "payload", True),
        (finding(svm_digest=A), None, "payload", False),
        (finding(svm_digest=A), records(None, None), "payload", False),
        (finding(svm_digest=A), records(record(), None), "payload", False),
        # the maps' digests, compared here
        (finding(svm_digest=A), records(record(1), record(2)), "payload", True),
        (finding(svm_digest=A), records(record(1), record(1)), "payload", False),
        (finding(svm_digest=A), records(record(1), record(2, epoch=4)), "payload", False),  # of another epoch: no twin
        (finding(svm_digest=A), records(record(1), record(1, end=9)), "payload", True),
        (finding(svm_digest=A), records(record(1), record(1, kind=SYN)), "payload", True),
        # datagrams of other lengths
        (finding(reason="datagram"), records(record(1, kind=DATAGRAM), record(2, kind=DATAGRAM)), "payload", True),
        (finding(reason="datagram"), records(record(1, kind=DATAGRAM), record(2, end=9, kind=DATAGRAM)), "length", True),
        (finding(), records(record(1), record(2, end=9)), "payload", True),  # segment borders of streams differ freely
        # who lacks something
        (finding("timeout", "missing_on_pvm"), records(record(), None), "missing_on_svm", True),
        (finding("timeout", "missing_on_svm"), records(None, record()), "missing_on_pvm", True),
        (finding("timeout", "missing_on_pvm"), records(record(start=5), record(start=9)), "missing_on_svm", True),
        (finding("timeout", "missing_on_svm"), records(record(start=9), record(start=5)), "missing_on_pvm", True),
        (finding("timeout", "missing_on_svm"), records(record(start=2), record(start=0xFFFFFFFE)), "missing_on_pvm", True),
        (finding("timeout", "missing_on_svm"), records(record(start=5), record(start=5)), "missing_on_svm", True),
        (finding("timeout", "missing_on_pvm"), records(record(kind=DATAGRAM), record(kind=DATAGRAM)), "missing_on_pvm", True),
        (finding("high_water", "fifo_full"), records(record(), None), "fifo_full", True),
    ],
)  # fmt: skip
def test_a_second_look(first: Finding, flow: FlowRecords | None, reason: str, confirmed: bool) -> None:
    found = looked_up(first, flow)
    assert (found.reason, found.confirmed) == (reason, confirmed)


def test_a_finding_is_one_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coloebpf")
    reader = FakeReader(records(record(1), record(2)))
    comparer = Comparer(reader, clock=lambda: 905_000, pair_of=lambda nic: {1: "web"}[nic])
    got = comparer.look([finding()])
    assert got == [replace(finding(), pvm=1, svm=1)]
    assert [entry.getMessage() for entry in caplog.records] == [
        "the VMs' output differs reason=payload pair=web nic=1 flow=6:10.0.0.1:80-10.0.0.9:5000 offset=77 epoch=3 "
        f"pvm_digest={A} svm_digest={B} pvm_waiting=1 svm_waiting=1 age_us=900"
    ]
    assert comparer.counts["payload"] == 1


def test_a_difference_that_is_none_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Comparer(FakeReader(), clock=lambda: 0).look([finding(svm_digest=A)])
    assert [(entry.levelname, entry.getMessage().partition(" reason")[0]) for entry in caplog.records] == [
        ("WARNING", "equal digests were told as different")
    ]


def test_a_burst_is_looked_at_in_part_and_counted_whole(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coloebpf")
    reader = FakeReader(records(record(), None))
    comparer = Comparer(reader, clock=lambda: 0)
    got = comparer.look([finding("timeout", "missing_on_svm")] * (DETAILS + 10))
    assert reader.asked == 1, "the table of records is read once"
    assert [each.pvm for each in got] == [1] * DETAILS + [-1] * 10
    assert len(caplog.records) == DETAILS + 1
    assert caplog.records[-1].getMessage() == "more findings at once than are looked at more=10"
    assert comparer.counts["missing_on_svm"] == DETAILS + 10


def test_high_water_needs_no_look(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "coloebpf")
    reader = FakeReader()
    assert Comparer(reader, clock=lambda: 0).look([finding("high_water", "no_slot")])[0].reason == "no_slot"
    assert reader.asked == 0
    assert "running out reason=no_slot" in caplog.text


@pytest.mark.parametrize(
    ("room", "low"),
    [
        (ROOM, False),
        (replace(ROOM, slots_free=26), False),
        (replace(ROOM, slots_free=25), True),
        (replace(ROOM, flows_free=26), False),
        (replace(ROOM, flows_free=25), True),
    ],
)
def test_room(room: Room, low: bool) -> None:
    assert room.low is low


class FakeSweep:
    """A table of `top` flows that is seen 100 at a time; each part takes `ns`."""

    def __init__(self, top: int) -> None:
        self.top, self.starts, self.now = top, list[int](), 0

    def sweep_some(self, start: int, runs: int) -> int:
        self.starts.append(start)
        self.now += 7 if start == 100 else 3
        return start + 100 if start + 100 < self.top else 0


def test_a_walk_lets_others_run_between_its_parts() -> None:
    sweep = FakeSweep(250)
    walk = Walk(sweep, FakeReader(), clock=lambda: sweep.now)
    between: list[int] = []

    async def watch() -> None:
        while len(sweep.starts) < 3:
            between.append(len(sweep.starts))
            await asyncio.sleep(0)

    async def both() -> Room:
        _, room = await asyncio.gather(watch(), walk.round())
        return room

    room = asyncio.run(both())
    assert sweep.starts == [0, 100, 200]
    assert between == [0, 1, 2]
    assert room == ROOM
    assert walk.longest_ns == 7
    assert walk.took_ns == 3 + 7 + 3
