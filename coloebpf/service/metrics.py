"""What Prometheus is told: made anew for each scrape, out of the service's status and the dataplane's counters.

Names follow Prometheus' conventions: units in names, `_total` for what only grows, times as Unix seconds. Labels take
their values from the configuration (pair, nic, path) or from a fixed list; never from the traffic.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client.core import GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from coloebpf.model import State
from coloebpf.service import metrics_dataplane
from coloebpf.service.metric_rows import counter, gauge
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


def families(status: Status, snapshot: metrics_dataplane.Snapshot | None) -> Iterator[Metric]:
    """Everything of one scrape; without a snapshot (the dataplane can't be read) only what the service knows."""
    build = GaugeMetricFamily(
        "coloebpf_build_info", "1; what runs here", labels=("host", "version", "kernel", "python")
    )
    build.add_metric((status.host, status.version, platform.release(), platform.python_version()), 1)
    yield build
    yield gauge("dataplane_up", "1 if the maps of the dataplane could be read", [((), snapshot is not None)])
    yield gauge("warnings", "Warnings in `coloebpf status`", [((), len(status.warnings))])
    yield from _pairs(status)
    yield from _checkpoints(status.pairs)
    yield from _disks(status.pairs)
    yield from _other_host(status)
    if snapshot is not None:
        yield from metrics_dataplane.of_nics(status.pairs, snapshot)
        yield from metrics_dataplane.of_tables(snapshot)


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
    yield gauge(
        "pair_state",
        "1 for the state that the pair is in, 0 for the others",
        [((p.name, p.role, state), p.state == state) for p in pairs for state in STATES],
        ("pair", "role", "state"),
    )
    yield gauge(
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
        yield gauge(name, text, [((p.name,), value(p)) for p in pairs], ("pair",))
    yield gauge(
        "pair_right_ends_timestamp_seconds",
        "When this host's right to speak for the pair ends, unless it is renewed",
        [((p.name,), _when(status, -p.arbiter_deadline_in_ms)) for p in pairs if p.arbiter_deadline_in_ms is not None],
        ("pair",),
    )
    yield gauge(
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
    yield counter(
        "checkpoints",
        "Checkpoints that committed, by what had asked for them",
        [((p.name, *row), n) for p in pairs for *row, n in _listed(TRIGGERS, p.checkpoints)],
        ("pair", "trigger"),
    )
    yield counter(
        "checkpoint_failures",
        "Checkpoints that did not come about",
        [((p.name,), p.checkpoints_failed) for p in pairs],
        ("pair",),
    )
    yield counter(
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


def _disks(pairs: Sequence[PairStatus]) -> Iterator[Metric]:
    disks = [(p.name, p.disk) for p in pairs if p.disk is not None]
    if not disks:
        return
    yield gauge(
        "disk_overlay_bytes",
        "Size of an overlay of the secondary's disk: what was written since the last checkpoint",
        [row for name, d in disks for row in (((name, "active"), d.active), ((name, "hidden"), d.hidden))],
        ("pair", "overlay"),
    )
    yield gauge(
        "disk_free_bytes", "What the file system has left for overlays", [((n,), d.free) for n, d in disks], ("pair",)
    )
    yield gauge(
        "disk_uncommitted",
        "1 if this host has taken over and its image is not whole without its overlays",
        [((n,), d.uncommitted) for n, d in disks],
        ("pair",),
    )
    yield counter(
        "disk_errors",
        "Checkpoints that failed because a write had not reached the secondary's disk",
        [((n,), d.errors) for n, d in disks],
        ("pair",),
    )


def _other_host(status: Status) -> Iterator[Metric]:
    peer = status.peer
    if peer is not None:
        yield gauge("peer_connected", "1 if the link to the other service stands", [((), peer.connected)])
        yield gauge(
            "peer_last_seen_timestamp_seconds",
            "When the other service was heard on the link for the last time",
            [((), _when(status, ago)) for ago in (peer.seen_ago_ms,) if ago is not None],
        )
        yield gauge(
            "peer_round_trip_seconds",
            "From a heartbeat on the link to its answer",
            [((), rtt / 1000) for rtt in (peer.rtt_ms,) if rtt is not None],
        )
        yield counter(
            "link_refusals",
            "Connections and messages of the link that were turned away",
            [(row, n) for *row, n in _listed(REFUSALS, peer.refused)],
            ("reason",),
        )
    paths = status.paths
    yield gauge("heartbeat_alive", "1 if heartbeats come on the path", [((p.name,), p.alive) for p in paths], ("path",))
    yield gauge(
        "heartbeat_last_seen_timestamp_seconds",
        "When a heartbeat came on the path for the last time",
        [((p.name,), _when(status, p.seen_ago_ms)) for p in paths if p.seen_ago_ms is not None],
        ("path",),
    )
    yield counter("heartbeats", "Heartbeats that came on the path", [((p.name,), p.beats) for p in paths], ("path",))
    yield counter(
        "heartbeat_strangers",
        "Frames that claimed to be heartbeats and were not the other service's",
        [((p.name,), p.strangers) for p in paths],
        ("path",),
    )
    yield gauge(
        "certificate_expiry_timestamp_seconds",
        "When a certificate of the link ends",
        [((c.name,), c.expires) for c in status.certificates],
        ("certificate",),
    )


def _listed(known: Sequence[str], counts: Mapping[str, int]) -> Iterator[tuple[str, int]]:
    """A count for each name of the list, and one for all the others together."""
    for name in known:
        yield name, counts.get(name, 0)
    yield OTHER, sum(count for name, count in counts.items() if name not in known)


def _when(status: Status, ago_ms: float) -> float:
    return status.time - ago_ms / 1000
