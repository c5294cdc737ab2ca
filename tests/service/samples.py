"""A service's status and a dataplane's snapshot in which every number is another one."""

from __future__ import annotations

from typing import Any

from coloebpf.model import DROPS, REASONS
from coloebpf.service.status import (
    CertificateStatus,
    CheckpointStatus,
    Durations,
    NicStatus,
    PairStatus,
    PathStatus,
    PeerStatus,
    PendingCheckpoint,
    Status,
    Uncompared,
)

NOW = 1_700_000_000.0  # Unix seconds


def durations() -> Durations:
    times = Durations()
    for seconds in (0.004, 0.004, 0.2, 40.0):
        times.observe(seconds)
    return times


def status() -> Status:
    return Status(
        host="a",
        version="0.1.0",
        time=NOW,
        uptime_ms=90_061_000,
        peer=PeerStatus(name="b", connected=True, seen_ago_ms=20, rtt_ms=0.4, refused={"certificate": 2, "replay": 1}),
        paths=[
            PathStatus(name="management", alive=True, seen_ago_ms=30, beats=1000),
            PathStatus(name="fwd0", alive=False, seen_ago_ms=5000, beats=900, strangers=3),
        ],
        certificates=[
            CertificateStatus(name="own", file="/etc/coloebpf/pki/host.pem", expires=NOW + 86_400 * 100),
            CertificateStatus(name="ca", file="/etc/coloebpf/pki/ca.pem", expires=NOW + 86_400 * 3000),
        ],
        pairs=[
            PairStatus(
                name="web",
                number=3,
                role="primary",
                state="lockstep",
                state_for_ms=65_000,
                epoch=41,
                mode="periodic",
                mode_for_ms=5000,
                mode_reason="20 requests in 2 s",
                engine="model",
                engine_ready=True,
                arbiter="etcd",
                arbiter_deadline_in_ms=1500,
                checkpoints={"initial": 1, "divergence": 30, "interval": 9},
                checkpoints_failed=2,
                durations=durations(),
                pending=PendingCheckpoint(trigger="periodic", reason="100 ms are over", for_ms=3),
                last=CheckpointStatus(trigger="divergence", reason="the bytes differ", duration_ms=12.5, ago_ms=97),
                findings={"payload": 29, "flags": 1},
                uncompared=[Uncompared.exempted(5, "udp", 123, "0.0.0.0/0"), Uncompared.passed(5, "arp")],
                nics=[NicStatus(number=5, vif="vif1.0", fwd="fwd0", vlan=7, bridge="br0", mac="02:c0:10:00:00:01")],
            ),
            PairStatus(name="db", number=4, role="secondary", engine="libxl-colo", on_service_loss="open"),
        ],
        warnings=["No heartbeat comes on fwd0."],
    )


def snapshot() -> dict[str, Any]:
    names = [
        "mirrored_packets",
        "mirrored_bytes",
        "output_packets",
        "output_bytes",
        "segments",
        "compared_packets",
        "compared_bytes",
        "released_packets",
        "released_bytes",
        "released_unchanged",
        "committed_packets",
        "reentered",
        "held_packets",
        "unheld_packets",
        "retransmissions",
        "policy_passed",
        "exempt",
        "unprotected",
        "lowered",
        "owed_acks",
        "svm_packets",
        "svm_bytes",
        "svm_parked",
        "svm_unparked",
        "svm_swallowed",
        "delivered",
        "translated",
        "svm_output",
        "events_lost",
        "timeouts",
        "high_waters",
        "kicks",
        "partial",
    ]
    numbers = {name: 1000 + 10 * i for i, name in enumerate(names)}
    buckets = [0] * 64
    buckets[3], buckets[10], buckets[20], buckets[40] = 4, 3, 2, 1
    return {
        "pairs": [{"pair": 3, "state": "lockstep", "epoch": 41}],
        "nics": [
            {
                "nic": 5,
                "pair": 3,
                "role": "primary",
                "vif": "vif1.0",
                "fwd": "fwd0",
                "vlan": 7,
                **numbers,
                "held": 12,
                "parked": 5,
                "divergences": {name: 100 + i for i, name in enumerate(REASONS)},
                "dropped": {name: 200 + i for i, name in enumerate(DROPS)},
                "holding_ns": {"count": 10, "p50": 2048, "p90": 2097152, "p99": 2199023255552},
                "holding_buckets": buckets,
            }
        ],
        "unknown_link": 17,
        "slots": {"total": 65536, "free": 65000},
        "flows": {"total": 4096, "free": 4000},
    }
