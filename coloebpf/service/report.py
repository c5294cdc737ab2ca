"""The service as it is now, for `coloebpf status`, /metrics and `top`: status.py, filled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coloebpf import __version__
from coloebpf.model import Policy, State
from coloebpf.service.config import PairConfig
from coloebpf.service.config_keys import PROTOCOLS
from coloebpf.service.pair import Supervisor
from coloebpf.service.primary import Primary
from coloebpf.service.status import (
    CertificateStatus,
    CheckpointStatus,
    NicStatus,
    PairStatus,
    PathStatus,
    PeerStatus,
    PendingCheckpoint,
    Status,
    Uncompared,
)

if TYPE_CHECKING:
    from coloebpf.service.assemble import Service

NS_PER_MS = 1_000_000
EXPIRY_DAYS = 30  # before a certificate's end it is a warning
ALONE = {
    State.PASSTHROUGH: "goes on without protection",
    State.PROMOTED: "runs here now, without protection",
    State.HALTED: "is silent on this host, which has no right to speak for it",
}


@dataclass
class Reporter:
    """control_socket.StatusSource."""

    world: Service
    clock: Callable[[], int]
    wall: Callable[[], float] = time.time
    _started_ns: int = field(init=False)

    def __post_init__(self) -> None:
        self._started_ns = self.clock()

    def snapshot(self) -> dict[str, Any]:
        """See StatusSource."""
        return self.world.hooks.control.snapshot()

    def status(self) -> Status:
        """See StatusSource."""
        world, now = self.world, self.clock()
        paths = world.heartbeat.status() if world.heartbeat else []
        status = Status(
            host=world.config.host.name, version=__version__, time=self.wall(), uptime_ms=_ms(now - self._started_ns),
            peer=self._peer(paths), paths=paths, pairs=[self._pair(pair, now) for pair in world.all()],
            certificates=[
                CertificateStatus(name=one.name, file=str(one.file), expires=one.at) for one in world.expiries
            ],
        )  # fmt: skip
        status.warnings = list(self._warnings(status))
        return status

    def _peer(self, paths: list[PathStatus]) -> PeerStatus | None:
        link, heartbeat = self.world.link, self.world.heartbeat
        if link is None or heartbeat is None:
            return None
        return PeerStatus(
            name=link.peer, connected=link.connected, refused=dict(link.refused.counts),
            seen_ago_ms=next((path.seen_ago_ms for path in paths if path.name == "management"), None),
            rtt_ms=None if heartbeat.rtt_ns is None else _ms(heartbeat.rtt_ns),
        )  # fmt: skip

    def _pair(self, pair: Supervisor, now: int) -> PairStatus:
        config = pair.config
        status = PairStatus(
            name=config.name, number=pair.number, role=config.role.name.lower(), state=pair.machine.state.name.lower(),
            state_for_ms=_ms(now - pair.state_since_ns), state_reason=pair.state_reason,
            alone_pending=pair.machine.alone_pending, epoch=pair.note().epoch, engine=config.engine,
            engine_ready=pair.engine_ready, arbiter=config.arbiter,
            arbiter_deadline_in_ms=_ms(pair.deadline_ns - now) if pair.deadline_ns else None,
            on_service_loss=config.on_service_loss, findings=dict(self.world.findings(pair.number)),
            uncompared=uncompared(config), mode_for_ms=_ms(now - pair.state_since_ns),
            nics=[
                NicStatus(
                    number=nic.number, vif=nic.vif, fwd=nic.fwd, vlan=nic.vlan, bridge=nic.bridge, mac=nic.mac
                )
                for nic in config.nics
            ],
        )  # fmt: skip
        if isinstance(pair, Primary):
            _checkpoints(status, pair, now)
        return status

    def _warnings(self, status: Status) -> Iterable[str]:
        yield from self.world.troubles.values()
        bears = self.world.heartbeat.bears_for_ns if self.world.heartbeat else 0
        if status.peer is not None and not status.peer.connected:
            restarts = f": it restarts, and may take {_ms(bears) / 1000:.1f} s more" if bears else ""
            yield f"host {status.peer.name}'s service is not connected{restarts}"
        for path in status.paths:
            if not path.alive:
                yield f"no heartbeat comes on {path.name}"
        for pair in status.pairs:
            state = State[pair.state.upper()]
            if state in ALONE:
                yield f"pair {pair.name}: the guest {ALONE[state]}: {pair.state_reason}"
            if pair.alone_pending:
                yield f"pair {pair.name}: the other host is lost, and nobody has said yet who goes on"
            if pair.arbiter == "none":
                yield f"pair {pair.name} has no arbiter: if the primary is lost, an operator must say `failover`"
        for one in self.world.expiries:
            left = one.days_left(status.time)
            if left < EXPIRY_DAYS:
                yield f"{one.file} ends in {left:.0f} days: make new certificates (coloebpf config init-pki)"


def _checkpoints(status: PairStatus, pair: Primary, now: int) -> None:
    ledger = pair.ledger
    status.mode, status.mode_reason = ledger.mode, ledger.mode_reason
    status.mode_for_ms = _ms(now - ledger.since_mode_ns)
    status.checkpoints, status.checkpoints_failed = dict(ledger.commits), ledger.failures
    status.durations = ledger.durations
    if ledger.pending is not None:
        wish = ledger.pending.wish
        status.pending = PendingCheckpoint(
            trigger=wish.trigger, reason=wish.reason, for_ms=_ms(now - ledger.pending.since_ns)
        )
    if ledger.last is not None:
        done = ledger.last
        status.last = CheckpointStatus(
            trigger=done.wish.trigger, reason=done.wish.reason, duration_ms=_ms(done.committed_ns - done.requested_ns),
            ago_ms=_ms(now - done.committed_ns), released=done.released,
        )  # fmt: skip


def uncompared(config: PairConfig) -> list[Uncompared]:
    """All that leaves without a comparison because the file says so."""
    names = {number: name for name, number in PROTOCOLS.items()}
    found = [
        Uncompared.exempted(one.nic, names.get(one.protocol, f"protocol {one.protocol}"), one.guest_port, one.remote)
        for one in config.exempts
    ]
    for nic in config.nics:
        found += [
            Uncompared.passed(nic.number, kind) for kind in ("arp", "nd", "other") if getattr(nic, kind) is Policy.PASS
        ]
    return found


def _ms(ns: int) -> float:
    return ns / NS_PER_MS
