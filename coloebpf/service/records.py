"""What the maps say of a flow: its state, and the first of its held and parked packets."""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coloebpf import bpfsys
from coloebpf.snapshot import GAUGE_FLOWS_USED, GAUGE_SLOTS_USED

if TYPE_CHECKING:
    from coloebpf.control import Control

NONE = 0xFFFFFFFF  # no slot (bpf/constants.h)
DEPTH = 128  # records of a list that are looked at, as the programs' own searches do (WALK there)
PROVEN = 1  # flag of struct held (bpf/types.h)
UNCHANGED = ("generation", "p_head", "s_head", "p_proven")  # of struct flow, while its lists are read
RECORD_BYTES = 64  # of struct held, likewise: the table is declared as bytes
LOW = (
    4  # a quarter or less is free: the programs ask for a checkpoint there too (SLOTS_LOW, and make_flow of bpf/flow.h)
)


@dataclass(frozen=True)
class Record:
    """A packet that P2 holds or P4 parks. `start` and `end`: stream positions; of datagrams 0 and the length."""

    type: int  # enum held_type
    digest: int
    since_ns: int
    start: int
    end: int
    epoch: int


@dataclass(frozen=True)
class FlowRecords:
    """A flow at one moment. `pvm`: the first packet of the PVM's without proof; `svm`: the first that is parked."""

    pvm_count: int
    svm_count: int
    pvm: Record | None
    svm: Record | None


@dataclass(frozen=True)
class Room:
    """What is left for holding packets and for flows, on the whole host."""

    slots: int
    slots_free: int
    flows: int
    flows_free: int

    @property
    def low(self) -> bool:
        """A checkpoint should make room."""
        return self.slots_free * LOW <= self.slots or self.flows_free * LOW <= self.flows


class MapReader:
    """Reads the pinned maps of one dataplane. What the programs change meanwhile is noticed, not waited for."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._record: Any = dict(control.shapes.leaf("scratch")._fields_)["held"]  # the one place where bcc shows it
        self._table: Any = control.shapes.leaf("held")()
        settings = control.shapes.leaf("settings")()
        bpfsys.lookup(control.fd("settings"), ct.c_uint32(0), settings)
        self._slots, self._flows = int(settings.slots), int(settings.flows)

    def flows(self, numbers: Iterable[int]) -> dict[int, FlowRecords | None]:
        """Several flows, for one read of the records' table (4 MiB, some 0.3 ms). None: it changed under our eyes."""
        before = {number: self._flow(number) for number in numbers}
        bpfsys.lookup(self._control.fd("held"), ct.c_uint32(0), self._table)
        found: dict[int, FlowRecords | None] = {}
        for number, flow in before.items():
            now = self._flow(number)
            same = all(getattr(flow, name) == getattr(now, name) for name in UNCHANGED)
            found[number] = self._records(flow, number) if same else None
        return found

    def room(self) -> Room:
        """What is free now."""
        used = []
        for gauge in (GAUGE_SLOTS_USED, GAUGE_FLOWS_USED):
            value = ct.c_int64()
            bpfsys.lookup(self._control.fd("gauges"), ct.c_uint32(gauge), value)
            used.append(value.value)
        return Room(self._slots, self._slots - used[0], self._flows, self._flows - used[1])

    def _flow(self, number: int) -> Any:
        flow = self._control.shapes.leaf("flows")()
        bpfsys.lookup(self._control.fd("flows"), ct.c_uint32(number), flow)
        return flow

    def _records(self, flow: Any, number: int) -> FlowRecords:
        unproven = (raw for raw in self._list(flow.p_head, number) if not raw.flags & PROVEN)
        return FlowRecords(
            pvm_count=flow.p_count,
            svm_count=flow.s_count,
            pvm=_record(next(unproven, None)),
            svm=_record(next(self._list(flow.s_head, number), None)),
        )

    def _list(self, head: int, number: int) -> Iterator[Any]:
        """Records of a flow in order; it ends where a record was given to another flow meanwhile."""
        here = head
        for _ in range(DEPTH):
            if here >= self._slots:  # NONE
                return
            raw = self._record.from_buffer(self._table, here * RECORD_BYTES)
            if raw.flow != number:
                return
            yield raw
            here = raw.next


def _record(raw: Any) -> Record | None:
    if raw is None:
        return None
    return Record(raw.type, raw.digest, raw.since_ns, getattr(raw, "from"), raw.end, raw.epoch)
