"""What the service says of itself: the object behind `coloebpf status --json`, /metrics and `top`.

The supervisor fills it anew for each question; nothing here is kept. Times are ages and remainders in milliseconds at
the moment `Status.time` (Unix seconds), so that no reader has to know CLOCK_MONOTONIC. None means "never" or "none".
Names of states, roles and policies are those of coloebpf.model in lower case.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import Any

from coloebpf.model import Policy
from coloebpf.service.config import PairConfig
from coloebpf.service.config_keys import PROTOCOLS
from coloebpf.service.disks import Usage
from coloebpf.service.rules import TRIGGERS as TRIGGERS  # what may ask for a checkpoint

LOCKSTEP_MODE, PERIODIC_MODE = "lockstep", "periodic"
MODES = (LOCKSTEP_MODE, PERIODIC_MODE)
# Why the link turned a connection or a message away (peer/link.py).
REFUSALS = ("certificate", "name", "version", "oversized", "malformed", "replay", "timeout", "surplus")
# What the comparer calls a difference between the guests (comparer.py).
FINDINGS = ("payload", "length", "flags", "missing_on_svm", "missing_on_pvm", "structure")
PROTOCOL_NAMES = {number: name for name, number in PROTOCOLS.items()}
BY_EXEMPTION, BY_POLICY = "exemption", "policy"

# Upper edges of a checkpoint's duration, s: from a model engine's 1 ms to a live copy's half minute.
DURATION_EDGES_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


@dataclass(kw_only=True)
class Durations:
    """A histogram: `counts[i]` times were at most `DURATION_EDGES_S[i]` and above the edge before; last: more."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(DURATION_EDGES_S) + 1))
    sum_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Counts one."""
        self.counts[bisect_left(DURATION_EDGES_S, seconds)] += 1
        self.sum_s += seconds


@dataclass(kw_only=True)
class PeerStatus:
    """The other host's service, as this one's link sees it."""

    name: str
    connected: bool = False
    seen_ago_ms: float | None = None  # the last message of the link, whatever it was
    rtt_ms: float | None = None
    patience_ms: float = 0.0  # it restarts as planned, and for so much longer its silence means nothing
    refused: dict[str, int] = field(default_factory=dict)  # REFUSALS -> how many since the service started


@dataclass(kw_only=True)
class PathStatus:
    """A way on which heartbeats come: "management", or the name of a forward device."""

    name: str
    alive: bool = False
    seen_ago_ms: float | None = None
    beats: int = 0
    strangers: int = 0  # frames that were no beat of the peer's present session


@dataclass(kw_only=True)
class CertificateStatus:
    """A certificate that the link uses."""

    name: str  # "own" or "ca"
    file: str
    expires: float  # Unix seconds


@dataclass(kw_only=True)
class Uncompared:
    """Traffic that leaves without a comparison, because the configuration says so."""

    nic: int
    why: str  # BY_EXEMPTION or BY_POLICY
    what: str  # in words, for people

    @classmethod
    def exempted(cls, nic: int, protocol: str, guest_port: int, remote: str) -> Uncompared:
        """An exemption of the configuration; `guest_port` 0 is every port."""
        port = f" of the guest's port {guest_port}" if guest_port else ""
        return cls(nic=nic, why=BY_EXEMPTION, what=f"{protocol}{port} with {remote}")

    @classmethod
    def passed(cls, nic: int, kind: str) -> Uncompared:
        """A policy "pass"; `kind` is its key in the configuration: "arp", "nd" or "other"."""
        words = {"arp": "ARP", "nd": "neighbour discovery and MLD", "other": "Ethernet types other than IP and ARP"}
        return cls(nic=nic, why=BY_POLICY, what=words[kind])


@dataclass(kw_only=True)
class NicStatus:
    """A NIC of the pair's guest on this host; its counters are the dataplane's, by `number`."""

    number: int
    vif: str
    fwd: str
    vlan: int = 0
    bridge: str = ""
    mac: str = ""


@dataclass(kw_only=True)
class PendingCheckpoint:
    """A checkpoint that was asked for and has not committed."""

    trigger: str
    reason: str
    for_ms: float  # since it was asked for


@dataclass(kw_only=True)
class CheckpointStatus:
    """The checkpoint that committed last."""

    trigger: str
    reason: str
    duration_ms: float  # from the request to the commit
    ago_ms: float  # since the commit
    released: int = 0  # packets that it let leave


@dataclass(kw_only=True)
class PairStatus:
    """One protected guest on this host."""

    name: str
    number: int
    role: str
    state: str = "unprotected"
    state_for_ms: float = 0.0
    state_reason: str = ""
    alone_pending: bool = False  # the other side is lost and the arbiter has not answered yet
    epoch: int = 0
    mode: str = LOCKSTEP_MODE
    mode_for_ms: float = 0.0
    mode_reason: str = ""
    engine: str = ""
    engine_ready: bool = False  # it can be asked for a checkpoint
    engine_progress: str = ""  # how far the checkpoint under way is, of engines that say so
    arbiter: str = "none"
    arbiter_deadline_in_ms: float | None = None  # the right to speak ends then; None: it has no end
    silent: bool = False  # it has ended: whatever the state, the programs drop what the guest sends
    on_service_loss: str = "hold"
    checkpoints: dict[str, int] = field(default_factory=dict)  # TRIGGERS -> committed
    checkpoints_failed: int = 0
    durations: Durations = field(default_factory=Durations)
    pending: PendingCheckpoint | None = None
    last: CheckpointStatus | None = None
    findings: dict[str, int] = field(default_factory=dict)  # FINDINGS -> how many
    uncompared: list[Uncompared] = field(default_factory=list)
    nics: list[NicStatus] = field(default_factory=list)
    disk: Usage | None = None  # of a guest whose disk is replicated

    @classmethod
    def of(cls, pair: PairConfig) -> PairStatus:
        """What the configuration says of it; the rest is the supervisor's."""
        uncompared = [
            Uncompared.exempted(e.nic, PROTOCOL_NAMES.get(e.protocol, f"protocol {e.protocol}"), e.guest_port, e.remote)
            for e in pair.exempts
        ]
        for nic in pair.nics:
            for kind in ("arp", "nd", "other"):
                if getattr(nic, kind) == Policy.PASS:
                    uncompared.append(Uncompared.passed(nic.number, kind))
        return cls(
            name=pair.name,
            number=pair.number,
            role=pair.role.name.lower(),
            engine=pair.engine,
            arbiter=pair.arbiter,
            on_service_loss=pair.on_service_loss,
            uncompared=uncompared,
            nics=[
                NicStatus(number=n.number, vif=n.vif, fwd=n.fwd, vlan=n.vlan, bridge=n.bridge, mac=n.mac)
                for n in pair.nics
            ],
        )


@dataclass(kw_only=True)
class Status:
    """One host's service."""

    host: str
    version: str
    time: float  # Unix seconds at which this was true
    uptime_ms: float = 0.0
    peer: PeerStatus | None = None
    paths: list[PathStatus] = field(default_factory=list)
    certificates: list[CertificateStatus] = field(default_factory=list)
    pairs: list[PairStatus] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # whole sentences, the newest state of things, no history

    def as_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return dataclasses.asdict(self)
