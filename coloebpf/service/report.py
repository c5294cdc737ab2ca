"""The service as it is now, for `coloebpf status`, /metrics and `top`: status.py, filled."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from coloebpf import __version__
from coloebpf.model import State
from coloebpf.service.concerns import concerns
from coloebpf.service.engine import Showing, Storing
from coloebpf.service.pair import Supervisor
from coloebpf.service.primary import Primary
from coloebpf.service.status import (
    CertificateStatus,
    CheckpointStatus,
    PairStatus,
    PathStatus,
    PeerStatus,
    PendingCheckpoint,
    Status,
)

if TYPE_CHECKING:
    from coloebpf.service.assemble import Service

NS_PER_MS = 1_000_000


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
        paths = world.other.heartbeat.status() if world.other else []
        status = Status(
            host=world.config.host.name, version=__version__, time=self.wall(), uptime_ms=_ms(now - self._started_ns),
            peer=self._peer(paths), paths=paths, pairs=[self._pair(pair, now) for pair in world.all()],
            certificates=[
                CertificateStatus(name=one.name, file=str(one.file), expires=one.at)
                for one in (world.other.expiries if world.other else ())
            ],
        )  # fmt: skip
        status.warnings = [*world.troubles.values(), *concerns(status)]
        return status

    def _peer(self, paths: list[PathStatus]) -> PeerStatus | None:
        if self.world.other is None:
            return None
        link, heartbeat = self.world.other.link, self.world.other.heartbeat
        return PeerStatus(
            name=link.peer, connected=link.connected, refused=dict(link.refused.counts),
            seen_ago_ms=next((path.seen_ago_ms for path in paths if path.name == "management"), None),
            patience_ms=_ms(heartbeat.bears_for_ns),
            rtt_ms=None if heartbeat.rtt_ns is None else _ms(heartbeat.rtt_ns),
        )  # fmt: skip

    def _pair(self, pair: Supervisor, now: int) -> PairStatus:
        config = pair.config
        status = PairStatus.of(config)
        status.state, status.state_reason = pair.machine.state.name.lower(), pair.state_reason
        status.state_for_ms = status.mode_for_ms = _ms(now - pair.state_since_ns)
        status.alone_pending, status.epoch = pair.machine.alone_pending, pair.note().epoch
        status.engine_ready, status.findings = pair.engine_ready, dict(self.world.findings(pair.number))
        if isinstance(pair.engine, Showing):
            status.engine_progress = pair.engine.progress
        if isinstance(pair.engine, Storing):
            status.disk = pair.engine.disk_usage()
        deadline_ns = self.world.control.deadline(pair.number)  # what the programs go by
        if deadline_ns:
            status.arbiter_deadline_in_ms = _ms(deadline_ns - now)
            status.silent = deadline_ns < now and pair.machine.state is not State.HALTED
        if isinstance(pair, Primary):
            _checkpoints(status, pair, now)
        return status


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


def _ms(ns: int) -> float:
    return ns / NS_PER_MS
