"""From the programs' events to findings: both digests compared again, the difference given a class, one line each."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from coloebpf.service.log import say
from coloebpf.service.records import FlowRecords, Room

log = logging.getLogger("coloebpf.comparer")

CLASSES = ("payload", "length", "flags", "missing_on_svm", "missing_on_pvm", "structure")
# The programs' reasons (coloebpf.model.REASONS) in the classes that people are told.
CLASS_OF = {
    "payload": "payload",
    "datagram": "payload",
    "fin": "length",  # one VM's stream ends where the other's goes on
    "flags": "flags",
    "options": "flags",
    "rst": "flags",
    "missing_on_svm": "missing_on_svm",
    "missing_on_pvm": "missing_on_pvm",
    "structure": "structure",
}
DATA, DATAGRAM = 1, 5  # enum held_type of bpf/types.h
DETAILS = 32  # findings of one read that are looked up and logged; the rest are counted: a burst must not stop the loop
WALK_RUNS = 8  # batches of a part of the walk: some 0.15 ms (tests/bench/walk.py)

Event = Mapping[str, Any]


@dataclass(frozen=True)
class Finding:
    """Something that asks for a checkpoint.

    `kind`: "divergence", "timeout", "high_water"; `reason`: one of CLASSES, of high water the drop that comes next.
    `confirmed`: the digests differ, or one is missing, as told. `pvm`, `svm`: packets that wait in the flow, -1: not
    looked up.
    """

    kind: str
    reason: str
    nic: int
    epoch: int
    time_ns: int
    flow_number: int
    flow: str
    offset: int
    pvm_digest: str
    svm_digest: str
    confirmed: bool
    pvm: int = -1
    svm: int = -1


class Reader(Protocol):
    """coloebpf.service.records.MapReader."""

    def flows(self, numbers: Iterable[int]) -> dict[int, FlowRecords | None]: ...

    def room(self) -> Room: ...


class SweepControl(Protocol):
    """The part of coloebpf.control.Control that the walk needs."""

    def sweep_some(self, start: int, runs: int) -> int: ...


def flow_text(flow: Mapping[str, Any]) -> str:
    """A flow in one word: proto:guest:port-remote:port."""
    tags = "".join(f"@{tag}" for tag in flow["vlans"])
    return f"{flow['proto']}:{flow['guest']}:{flow['guest_port']}-{flow['remote']}:{flow['remote_port']}{tags}"


def finding_of(event: Event) -> Finding | None:
    """What an event says by itself, its two digests compared. None: it asks for nothing (a kick)."""
    if event["kind"] not in ("divergence", "timeout", "high_water"):
        return None
    reason = event["reason"] if event["kind"] == "high_water" else CLASS_OF.get(event["reason"], "structure")
    differ = event["pvm_digest"] != event["svm_digest"]
    # Flags may differ over equal bytes; what is missing has no twin to compare with.
    return Finding(
        kind=event["kind"], reason=reason, nic=event["nic"], epoch=event["epoch"], time_ns=event["time_ns"],
        flow_number=event["flow_number"], flow=flow_text(event["flow"]), offset=event["offset"],
        pvm_digest=event["pvm_digest"], svm_digest=event["svm_digest"],
        confirmed=differ or reason not in ("payload", "length"),
    )  # fmt: skip


def looked_up(finding: Finding, flow: FlowRecords | None) -> Finding:
    """The finding with what the maps say of its flow now; without it if the flow has gone on meanwhile."""
    if flow is None or finding.kind == "high_water":
        return finding
    finding = replace(finding, pvm=flow.pvm_count, svm=flow.svm_count)
    pvm, svm = flow.pvm, flow.svm
    if pvm is None and svm is None:
        return finding
    if finding.kind == "timeout":
        return replace(finding, reason=_missing(finding.reason, flow))
    if pvm is None or svm is None or pvm.epoch != svm.epoch:
        return finding
    same_kind = pvm.type == svm.type
    differ = not same_kind or pvm.digest != svm.digest or pvm.end != svm.end
    if finding.reason == "payload" and same_kind and pvm.type == DATAGRAM and pvm.end != svm.end:
        return replace(finding, reason="length", confirmed=True)
    return replace(finding, confirmed=finding.confirmed or differ)


def _missing(told: str, flow: FlowRecords) -> str:
    """Which side lacks something: of two streams the one whose first packet begins later."""
    pvm, svm = flow.pvm, flow.svm
    if svm is None:
        return "missing_on_svm"
    if pvm is None:
        return "missing_on_pvm"
    ahead = (svm.start - pvm.start) & 0xFFFFFFFF if pvm.type == svm.type == DATA else 0
    if not ahead:
        return told
    return "missing_on_svm" if ahead < 0x80000000 else "missing_on_pvm"


class Comparer:
    """Looks at the findings of one host. `pair_of`: the name of the pair that a NIC is of."""

    def __init__(
        self, reader: Reader, clock: Callable[[], int], pair_of: Callable[[int], str | None] = lambda nic: None
    ) -> None:
        self._reader, self._clock, self._pair_of = reader, clock, pair_of
        self.counts: dict[str, int] = dict.fromkeys(CLASSES, 0)  # since the service's start

    def look(self, findings: Sequence[Finding]) -> list[Finding]:
        """Reads both sides' digests of the first DETAILS of them, says what is wrong, a line each, and counts all."""
        closer = findings[:DETAILS]
        numbers = {finding.flow_number for finding in closer if finding.kind != "high_water"}
        flows = self._reader.flows(numbers) if numbers else {}
        seen = [looked_up(finding, flows.get(finding.flow_number)) for finding in closer]
        for finding in seen:
            self._say(finding)
        if len(findings) > DETAILS:
            say(log, logging.WARNING, "more findings at once than are looked at", more=len(findings) - DETAILS)
        seen.extend(findings[DETAILS:])
        for finding in seen:
            if finding.reason in self.counts:
                self.counts[finding.reason] += 1
        return seen

    def _say(self, finding: Finding) -> None:
        if finding.kind == "high_water":
            sentence = "room for held packets is running out"
        elif finding.kind == "timeout":
            sentence = "output waits for the other VM for too long"
        else:
            sentence = "the VMs' output differs" if finding.confirmed else "equal digests were told as different"
        looked = finding.pvm >= 0
        say(
            log, logging.INFO if finding.confirmed else logging.WARNING, sentence, reason=finding.reason,
            pair=self._pair_of(finding.nic), nic=finding.nic, flow=finding.flow, offset=finding.offset,
            epoch=finding.epoch, pvm_digest=finding.pvm_digest, svm_digest=finding.svm_digest,
            pvm_waiting=finding.pvm if looked else None, svm_waiting=finding.svm if looked else None,
            age_us=(self._clock() - finding.time_ns) // 1000,
        )  # fmt: skip


class Walk:
    """The look at all flows for what waits too long; it tells by events, and ends idle flows on its way.

    `longest_ns`: of its parts, so far: for so long the event loop stood still. `took_ns`: all parts of the last round.
    """

    def __init__(self, control: SweepControl, reader: Reader, clock: Callable[[], int]) -> None:
        self._control, self._reader, self._clock = control, reader, clock
        self.longest_ns = self.took_ns = 0

    async def round(self) -> Room:
        """Sees each flow once, and lets the event loop run between parts. Returns what room there is."""
        here = took = 0
        while True:
            begin = self._clock()
            here = self._control.sweep_some(here, WALK_RUNS)
            part = self._clock() - begin
            self.longest_ns, took = max(self.longest_ns, part), took + part
            if not here:
                self.took_ns = took
                return self._reader.room()
            await asyncio.sleep(0)
