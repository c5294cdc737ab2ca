"""What of a status an operator should know without reading all of it: whole sentences, for `Status.warnings`."""

from __future__ import annotations

from collections.abc import Iterator

from coloebpf.service.disks import ROOM
from coloebpf.service.status import PERIODIC_MODE, PairStatus, Status
from coloebpf.units import amount

RENEW_DAYS = 30  # before its end a certificate is worth a warning; so has the alert ColoebpfCertificateEnds
DAY_S = 86_400
PROTECTED = ("syncing", "lockstep", "checkpointing")


def concerns(status: Status) -> list[str]:
    """In the order of their weight, pairs first."""
    return [sentence for pair in status.pairs for sentence in _of_pair(pair)] + list(_of_host(status))


def _of_pair(pair: PairStatus) -> Iterator[str]:
    name = f"Pair {pair.name}"
    why = f" ({pair.state_reason})" if pair.state_reason else ""
    if pair.state == "halted":
        yield f"{name} is halted{why}: this host may not speak for it."
    if pair.silent:
        yield f"{name}: this host's right to speak has ended, so what its guest sends is dropped."
    if pair.alone_pending:
        held = "" if pair.silent else "; output is held"
        yield f"{name}: the other host is lost, and arbiter {pair.arbiter} has not said who goes on{held}."
    if pair.state in ("passthrough", "promoted"):
        yield f"{name} runs on this host alone, without protection{why}: the next failure stops it."
    if pair.state in PROTECTED and not pair.engine_ready:
        yield f"{name}: engine {pair.engine} can't be asked for checkpoints."
    if pair.mode == PERIODIC_MODE:
        yield f"{name} is in periodic mode: {pair.mode_reason or 'its guests differ too often'}."
    if (disk := pair.disk) is not None:
        if disk.free < disk.size * ROOM:
            yield f"{name}: only {amount(disk.free)} are left for the overlays of {disk.image}: a full disk ends it."
        if disk.uncommitted:
            yield f"{name}: {disk.image} is not whole without its overlays: `coloebpf disks which {pair.name}`."
    if pair.arbiter == "none":
        yield (
            f"{name} has no arbiter: its secondary never takes over by itself, and its primary lets everything pass "
            "when the secondary is gone."
        )


def _of_host(status: Status) -> Iterator[str]:
    if status.peer is not None and not status.peer.connected and status.peer.patience_ms:
        left = status.peer.patience_ms / 1000
        yield f"The service of {status.peer.name} restarts: for {left:.1f} s more its silence means nothing."
    elif status.peer is not None and not status.peer.connected:
        yield f"There is no link to {status.peer.name}: nothing that both hosts have to agree on can be done."
    for path in status.paths:
        if not path.alive:
            yield f"No heartbeat comes on {path.name}: if the other paths are lost too, the arbiter decides."
    for certificate in status.certificates:
        days = (certificate.expires - status.time) / DAY_S
        if days < 0:
            yield f"{certificate.file} has expired: the link does not come back after its next interruption."
        elif days < RENEW_DAYS:
            yield f"{certificate.file} ends in {days:.0f} days: make new ones (coloebpf config init-pki)."
