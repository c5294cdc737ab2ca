"""What Prometheus is told of the dataplane: counters of NICs, holding times, tables, out of a snapshot of its maps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from coloebpf.model import DROPS, REASONS
from coloebpf.service.metric_rows import counter, gauge
from coloebpf.service.status import PairStatus

# Of the kernel's 64 powers of two: from 1 us, below which no packet is held, to 17 s, above which none should be.
FIRST_EDGE, LAST_EDGE = 10, 34

# Counters of a NIC that are one number: (name, what, key in the snapshot).
PLAIN = (
    ("mirrored_packets", "Client frames that were copied to the other host", "mirrored_packets"),
    ("mirrored_bytes", "Bytes of client frames that were copied to the other host", "mirrored_bytes"),
    ("output_packets", "Frames that the guest sent; a super-packet is one", "output_packets"),
    ("output_bytes", "Bytes of frames that the guest sent", "output_bytes"),
    ("compared_packets", "Packets of the primary's guest that the secondary's proved", "compared_packets"),
    ("compared_bytes", "Bytes of payload that the secondary's guest proved", "compared_bytes"),
    ("released_bytes", "Bytes that left for clients after a proof or a commit", "released_bytes"),
    ("svm_packets", "Packets of the secondary's guest that arrived here to be compared", "svm_packets"),
    ("svm_bytes", "Bytes of the secondary's guest that arrived here to be compared", "svm_bytes"),
    ("svm_swallowed_packets", "Packets of the secondary's guest that told nothing new", "svm_swallowed"),
    ("lowered_packets", "Packets that left with a lower ACK or window than the primary's guest gave", "lowered"),
    ("partial_packets", "Proven parts of held packets that left before the rest", "partial"),
    ("owed_acks", "ACKs that were sent for the guest when the secondary's caught up", "owed_acks"),
    ("delivered_packets", "Client frames given to the secondary's guest", "delivered"),
    ("translated_packets", "Packets whose TCP numbers were translated", "translated"),
    ("svm_output_packets", "Packets that the secondary's guest sent", "svm_output"),
    ("lost_events", "Events that found the ring buffer full", "events_lost"),
)
# What became of a frame that the primary's guest sent: (verdict, key).
VERDICTS = (
    ("passed_proven", "released_unchanged"),
    ("held", "held_packets"),
    ("repeated", "retransmissions"),
    ("policy", "policy_passed"),
    ("exempt", "exempt"),
    ("unprotected", "unprotected"),
)
EVENTS = (("timeout", "timeouts"), ("high_water", "high_waters"), ("kick", "kicks"))

Snapshot = Mapping[str, Any]


def of_nics(pairs: Sequence[PairStatus], snapshot: Snapshot) -> Iterator[Metric]:
    """By pair and NIC."""
    names = {pair.number: pair.name for pair in pairs}
    nics = [((names.get(nic["pair"], str(nic["pair"])), str(nic["nic"])), nic) for nic in snapshot["nics"]]
    where = ("pair", "nic")
    for name, text, key in PLAIN:
        yield counter(name, text, [(labels, nic[key]) for labels, nic in nics], where)
    yield counter(
        "verdicts",
        "What became of a packet that the primary's guest sent",
        [((*labels, verdict), nic[key]) for labels, nic in nics for verdict, key in VERDICTS],
        (*where, "verdict"),
    )
    yield counter(
        "released_packets",
        "Packets that left for clients, by what allowed it",
        [
            ((*labels, by), n)
            for labels, nic in nics
            for by, n in (
                ("proof", nic["released_packets"] - nic["committed_packets"]),
                ("commit", nic["committed_packets"]),
            )
        ],
        (*where, "by"),
    )
    for name, text, key, known in (
        ("divergences", "Differences between the guests, by kind", "divergences", REASONS),
        ("dropped_packets", "Frames that were not taken, by reason", "dropped", DROPS),
    ):
        rows = [((*labels, reason), nic[key][reason]) for labels, nic in nics for reason in known]
        yield counter(name, text, rows, (*where, "reason"))
    yield counter(
        "events",
        "What the programs told besides divergences",
        [((*labels, kind), nic[key]) for labels, nic in nics for kind, key in EVENTS],
        (*where, "kind"),
    )
    yield gauge("held_packets", "Packets that wait for a proof now", [(w, nic["held"]) for w, nic in nics], where)
    yield gauge(
        "parked_packets",
        "Packets of the secondary's guest that are ahead of the primary's now",
        [(labels, nic["parked"]) for labels, nic in nics],
        where,
    )
    waited = HistogramMetricFamily(
        "coloebpf_holding_time_seconds",
        "How long packets were held; the kernel keeps no sum",
        labels=where,
    )
    for labels, nic in nics:
        waited.add_metric(labels, list(_holding(nic["holding_buckets"])), None)
    yield waited


def _holding(buckets: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The kernel's buckets [2^i, 2^(i+1)) ns as Prometheus has them: how many below each edge, in seconds."""
    below = list(accumulate(buckets))
    for power in range(FIRST_EDGE, LAST_EDGE + 1):
        yield str((1 << power) / 1e9), below[power - 1]
    yield "+Inf", below[-1]


def of_tables(snapshot: Snapshot) -> Iterator[Metric]:
    """Of the whole host."""
    for name, what, key in (("slab_slots", "slots of the slab", "slots"), ("flows", "places for flows", "flows")):
        total, free = snapshot[key]["total"], snapshot[key]["free"]
        yield gauge(f"{name}_used", f"Used {what}", [((), total - free)])
        yield gauge(f"{name}_limit", f"All {what}", [((), total)])
    yield counter(
        "unknown_link_frames", "Frames on forward devices that are no NIC's", [((), snapshot["unknown_link"])]
    )
