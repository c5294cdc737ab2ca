"""Counters, states and holding times of one host, summed over CPUs, as plain dicts."""

from __future__ import annotations

import ctypes as ct
import socket
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coloebpf import bpfsys
from coloebpf.model import DROPS, MAX_NICS, REASONS, Role, State

if TYPE_CHECKING:
    from coloebpf.control import Control

WORD = (1 << 64) - 1
GAUGE_SLOTS_USED, GAUGE_FLOWS_USED = 0, 1  # bpf/maps.h
SCRATCHES = 2  # entries of the map of scratches: SCRATCH_HOOK, SCRATCH_USER


def possible_cpus(path: Path = Path("/sys/devices/system/cpu/possible")) -> int:
    """How many values a per-CPU map has."""
    return int(path.read_text().strip().split("-")[-1].split(",")[-1]) + 1


def _per_cpu_sum(control: Control, table: str, nic: int) -> Any:
    leaf = control.shapes.leaf(table)
    words = ct.sizeof(leaf) // 8  # counters and histograms are u64 throughout
    values = (ct.c_uint64 * (words * possible_cpus()))()
    bpfsys.lookup(control.fd(table), ct.c_uint32(nic), values)
    return leaf.from_buffer((ct.c_uint64 * words)(*add_up(memoryview(values).cast("B").cast("Q"), words)))


def add_up(values: memoryview, words: int) -> list[int]:
    """The values of all CPUs, `words` of them each, added word by word. Wraps at 2^64, as the kernel's own do."""
    return [sum(values[word::words]) & WORD for word in range(words)]


def counters(control: Control, nic: int) -> Any:
    """struct counters of a NIC, summed over CPUs."""
    return _per_cpu_sum(control, "counters", nic)


def holding(control: Control, nic: int) -> list[int]:
    """How many packets of a NIC were held for [2^i, 2^(i+1)) ns, for each i from 0 to 63."""
    return list(_per_cpu_sum(control, "holding", nic).bucket)


def _gauge(control: Control, number: int) -> int:
    value = ct.c_int64()
    bpfsys.lookup(control.fd("gauges"), ct.c_uint32(number), value)
    return value.value


def slots_used(control: Control) -> int:
    """Slots that something is in: those out of the stack of full magazines, less what CPUs keep at hand."""
    used = _gauge(control, GAUGE_SLOTS_USED)
    notes, magazine = control.shapes.leaf("scratch"), control.shapes.leaf("magazines")()
    for number in range(SCRATCHES):
        values = (notes * possible_cpus())()
        bpfsys.lookup(control.fd("scratch"), ct.c_uint32(number), values)
        for value in values:
            if value.magazine and bpfsys.lookup(control.fd("magazines"), ct.c_uint32(value.magazine), magazine):
                used -= ct.c_uint32.from_buffer(magazine).value  # its first word: how many
    return max(used, 0)  # read one after the other while they change


def percentiles(buckets: Sequence[int]) -> dict[str, int]:
    """Holding times in ns: the upper edge of the bucket (a power of two) that a percentile falls into; 0 for none."""
    count = sum(buckets)
    times = {"count": count}
    for name, percent in (("p50", 50), ("p90", 90), ("p99", 99)):
        reached = (100 * seen >= percent * count for seen in accumulate(buckets))
        times[name] = next(1 << (i + 1) for i, enough in enumerate(reached) if enough) if count else 0
    return times


def attached(control: Control) -> list[Any]:
    """struct nic of each NIC that attach() was called for, by their numbers."""
    found: dict[int, Any] = {}
    for vif in bpfsys.keys(control.fd("nics"), ct.c_uint32):
        nic = control.shapes.leaf("nics")()
        if bpfsys.lookup(control.fd("nics"), vif, nic) and nic.id not in found:
            found[nic.id] = control.shapes.leaf("nic_by_id")()  # which of its vifs the guest is behind
            bpfsys.lookup(control.fd("nic_by_id"), ct.c_uint32(nic.id), found[nic.id])
    return [found[number] for number in sorted(found)]


def _nic(control: Control, nic: Any) -> dict[str, Any]:
    c = counters(control, nic.id)
    held_for = holding(control, nic.id)
    plain = {name: getattr(c, name) for name, *_ in c._fields_ if name not in ("divergences", "dropped")}
    return {
        "nic": nic.id,
        "pair": nic.pair,
        "role": Role(nic.role).name.lower(),
        "vif": _name(nic.vif),
        "fwd": _name(nic.fwd),
        "vlan": nic.vlan,
        **plain,
        "held": c.held_packets - c.unheld_packets,
        "parked": c.svm_parked - c.svm_unparked,
        "divergences": {name: c.divergences[i] for i, name in enumerate(REASONS)},
        "dropped": {name: c.dropped[i] for i, name in enumerate(DROPS)},
        "holding_ns": percentiles(held_for),
        "holding_buckets": held_for,
    }


def _name(index: int) -> str:
    try:
        return socket.if_indextoname(index)
    except OSError:
        return f"gone ({index})"


def take(control: Control) -> dict[str, Any]:
    """Everything that `status --json` shows of one host."""
    nics = [_nic(control, nic) for nic in attached(control)]
    settings = control.shapes.leaf("settings")()
    bpfsys.lookup(control.fd("settings"), ct.c_uint32(0), settings)
    unknown = counters(control, MAX_NICS - 1).dropped[DROPS.index("unknown_link")]
    pairs = []
    for pair in sorted({n["pair"] for n in nics}):
        state = control.state(pair)
        pairs.append({"pair": pair, "state": State(state.state).name.lower(), "epoch": state.epoch})
    return {
        "pairs": pairs,
        "nics": nics,
        "unknown_link": unknown,
        "slots": {"total": settings.slots, "free": settings.slots - slots_used(control)},
        "flows": {"total": settings.flows, "free": settings.flows - _gauge(control, GAUGE_FLOWS_USED)},
    }
