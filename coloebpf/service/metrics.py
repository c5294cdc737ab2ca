"""What Prometheus is told: made anew for each scrape, out of the service's status and the dataplane's counters.

Names follow Prometheus' conventions: units in names, `_total` for what only grows, times as Unix seconds. Labels take
their values from the configuration (pair, nic, path) or from a fixed list; never from the traffic.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from coloebpf.model import DROPS, REASONS, State
from coloebpf.service.status import (
    BY_EXEMPTION,
    BY_POLICY,
    DURATION_EDGES_S,
    FINDINGS,
    MODES,
    REFUSALS,
    TRIGGERS,
    PairStatus,
    Status,
)

OTHER = "other"  # label for a name that is in no list of ours: one more series, not one for each name
STATES = tuple(state.name.lower() for state in State)

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


def families(status: Status, snapshot: Snapshot | None) -> Iterator[Metric]:
    """Everything of one scrape; without a snapshot (the dataplane can't be read) only what the service knows."""
    build = GaugeMetricFamily(
        "coloebpf_build_info", "1; what runs here", labels=("host", "version", "kernel", "python")
    )
    build.add_metric((status.host, status.version, platform.release(), platform.python_version()), 1)
    yield build
    yield _gauge("dataplane_up", "1 if the maps of the dataplane could be read", [((), snapshot is not None)])
    yield _gauge("warnings", "Warnings in `coloebpf status`", [((), len(status.warnings))])
    yield from _pairs(status)
    yield from _checkpoints(status.pairs)
    yield from _other_host(status)
    if snapshot is not None:
        yield from _nics(status.pairs, snapshot)
        yield from _tables(snapshot)


def _pairs(status: Status) -> Iterator[Metric]:
    pairs = status.pairs
    info = GaugeMetricFamily(
        "coloebpf_pair_info",
        "1; how the pair is set up",
        labels=("pair", "number", "role", "engine", "arbiter", "on_service_loss"),
    )
    for pair in pairs:
        info.add_metric((pair.name, str(pair.number), pair.role, pair.engine, pair.arbiter, pair.on_service_loss), 1)
    yield info
    yield _gauge(
        "pair_state",
        "1 for the state that the pair is in, 0 for the others",
        [((p.name, p.role, state), p.state == state) for p in pairs for state in STATES],
        ("pair", "role", "state"),
    )
    yield _gauge(
        "pair_mode",
        "1 for the mode that the pair is in, 0 for the other",
        [((p.name, mode), p.mode == mode) for p in pairs for mode in MODES],
        ("pair", "mode"),
    )
    rows = (
        ("pair_epoch", "Checkpoints begun; wraps at 2^32", lambda p: p.epoch),
        ("pair_engine_ready", "1 if the engine can be asked for a checkpoint", lambda p: p.engine_ready),
        ("pair_undecided", "1 while the other host is lost and nobody has said who goes on", lambda p: p.alone_pending),
        ("pair_silent", "1 while the right to speak has ended: what the guest sends is dropped", lambda p: p.silent),
        ("pair_state_change_timestamp_seconds", "When the state was entered", lambda p: _when(status, p.state_for_ms)),
        ("pair_mode_change_timestamp_seconds", "When the mode was entered", lambda p: _when(status, p.mode_for_ms)),
        ("checkpoint_pending", "1 while a checkpoint is under way", lambda p: p.pending is not None),
    )
    for name, text, value in rows:
        yield _gauge(name, text, [((p.name,), value(p)) for p in pairs], ("pair",))
    yield _gauge(
        "pair_right_ends_timestamp_seconds",
        "When this host's right to speak for the pair ends, unless it is renewed",
        [((p.name,), _when(status, -p.arbiter_deadline_in_ms)) for p in pairs if p.arbiter_deadline_in_ms is not None],
        ("pair",),
    )
    yield _gauge(
        "pair_uncompared_rules",
        "Kinds of traffic that leave uncompared because the configuration says so",
        [
            ((p.name, why), sum(entry.why == why for entry in p.uncompared))
            for p in pairs
            for why in (BY_EXEMPTION, BY_POLICY)
        ],
        ("pair", "why"),
    )


def _checkpoints(pairs: Sequence[PairStatus]) -> Iterator[Metric]:
    yield _counter(
        "checkpoints",
        "Checkpoints that committed, by what had asked for them",
        [((p.name, *row), n) for p in pairs for *row, n in _listed(TRIGGERS, p.checkpoints)],
        ("pair", "trigger"),
    )
    yield _counter(
        "checkpoint_failures",
        "Checkpoints that did not come about",
        [((p.name,), p.checkpoints_failed) for p in pairs],
        ("pair",),
    )
    yield _counter(
        "findings",
        "What the comparer made of divergences",
        [((p.name, *row), n) for p in pairs for *row, n in _listed(FINDINGS, p.findings)],
        ("pair", "finding"),
    )
    took = HistogramMetricFamily(
        "coloebpf_checkpoint_duration_seconds", "From the request of a checkpoint to its commit", labels=("pair",)
    )
    for p in pairs:
        edges = [*map(str, DURATION_EDGES_S), "+Inf"]
        took.add_metric((p.name,), list(zip(edges, accumulate(p.durations.counts), strict=True)), p.durations.sum_s)
    yield took


def _other_host(status: Status) -> Iterator[Metric]:
    peer = status.peer
    if peer is not None:
        yield _gauge("peer_connected", "1 if the link to the other service stands", [((), peer.connected)])
        yield _gauge(
            "peer_last_seen_timestamp_seconds",
            "When the other service was heard on the link for the last time",
            [((), _when(status, ago)) for ago in (peer.seen_ago_ms,) if ago is not None],
        )
        yield _gauge(
            "peer_round_trip_seconds",
            "From a heartbeat on the link to its answer",
            [((), rtt / 1000) for rtt in (peer.rtt_ms,) if rtt is not None],
        )
        yield _counter(
            "link_refusals",
            "Connections and messages of the link that were turned away",
            [(row, n) for *row, n in _listed(REFUSALS, peer.refused)],
            ("reason",),
        )
    paths = status.paths
    yield _gauge(
        "heartbeat_alive", "1 if heartbeats come on the path", [((p.name,), p.alive) for p in paths], ("path",)
    )
    yield _gauge(
        "heartbeat_last_seen_timestamp_seconds",
        "When a heartbeat came on the path for the last time",
        [((p.name,), _when(status, p.seen_ago_ms)) for p in paths if p.seen_ago_ms is not None],
        ("path",),
    )
    yield _counter("heartbeats", "Heartbeats that came on the path", [((p.name,), p.beats) for p in paths], ("path",))
    yield _counter(
        "heartbeat_strangers",
        "Frames that claimed to be heartbeats and were not the other service's",
        [((p.name,), p.strangers) for p in paths],
        ("path",),
    )
    yield _gauge(
        "certificate_expiry_timestamp_seconds",
        "When a certificate of the link ends",
        [((c.name,), c.expires) for c in status.certificates],
        ("certificate",),
    )


def _nics(pairs: Sequence[PairStatus], snapshot: Snapshot) -> Iterator[Metric]:
    names = {pair.number: pair.name for pair in pairs}
    nics = [((names.get(nic["pair"], str(nic["pair"])), str(nic["nic"])), nic) for nic in snapshot["nics"]]
    where = ("pair", "nic")
    for name, text, key in PLAIN:
        yield _counter(name, text, [(labels, nic[key]) for labels, nic in nics], where)
    yield _counter(
        "verdicts",
        "What became of a packet that the primary's guest sent",
        [((*labels, verdict), nic[key]) for labels, nic in nics for verdict, key in VERDICTS],
        (*where, "verdict"),
    )
    yield _counter(
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
        yield _counter(name, text, rows, (*where, "reason"))
    yield _counter(
        "events",
        "What the programs told besides divergences",
        [((*labels, kind), nic[key]) for labels, nic in nics for kind, key in EVENTS],
        (*where, "kind"),
    )
    yield _gauge("held_packets", "Packets that wait for a proof now", [(w, nic["held"]) for w, nic in nics], where)
    yield _gauge(
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


def _tables(snapshot: Snapshot) -> Iterator[Metric]:
    for name, what, key in (("slab_slots", "slots of the slab", "slots"), ("flows", "places for flows", "flows")):
        total, free = snapshot[key]["total"], snapshot[key]["free"]
        yield _gauge(f"{name}_used", f"Used {what}", [((), total - free)])
        yield _gauge(f"{name}_limit", f"All {what}", [((), total)])
    yield _counter(
        "unknown_link_frames", "Frames on forward devices that are no NIC's", [((), snapshot["unknown_link"])]
    )


Rows = Iterable[tuple[Sequence[str], float]]


def _gauge(name: str, text: str, rows: Rows, labels: Sequence[str] = ()) -> Metric:
    family = GaugeMetricFamily(f"coloebpf_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family


def _counter(name: str, text: str, rows: Rows, labels: Sequence[str] = ()) -> Metric:
    family = CounterMetricFamily(f"coloebpf_{name}", text, labels=labels)
    for values, number in rows:
        family.add_metric(values, float(number))
    return family


def _listed(known: Sequence[str], counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """A count for each name of the list, and one for all the others together."""
    for name in known:
        yield name, counts.get(name, 0)
    yield OTHER, sum(count for name, count in counts.items() if name not in known)


def _when(status: Status, ago_ms: float) -> float:
    return status.time - ago_ms / 1000
