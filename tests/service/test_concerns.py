"""Warnings out of a status."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from coloebpf.service.concerns import concerns
from coloebpf.service.disks import Usage
from coloebpf.service.status import CertificateStatus, PairStatus, PathStatus, PeerStatus, Status

NOW = 1_700_000_000.0
DAY_S = 86_400


def good() -> Status:
    """A host about which there is nothing to say."""
    return Status(
        host="a",
        version="1",
        time=NOW,
        peer=PeerStatus(name="b", connected=True),
        paths=[PathStatus(name="management", alive=True), PathStatus(name="fwd0", alive=True)],
        certificates=[CertificateStatus(name="own", file="host.pem", expires=NOW + 31 * DAY_S)],
        pairs=[
            PairStatus(
                name="web",
                number=0,
                role="primary",
                state="lockstep",
                engine="model",
                engine_ready=True,
                arbiter="etcd",
            )
        ],
    )


def pair(**changes: object) -> Callable[[Status], None]:
    def change(status: Status) -> None:
        for name, value in changes.items():
            setattr(status.pairs[0], name, value)

    return change


DISK = Usage(image="/i/web.img", active=1 << 20, hidden=0, free=1 << 30, size=1000 << 20, errors=0, follows=True,
             uncommitted=False, good=False)  # fmt: skip


def of(part: str, **changes: object) -> Callable[[Status], None]:
    def change(status: Status) -> None:
        found = getattr(status, part)
        for name, value in changes.items():
            setattr(found[-1] if isinstance(found, list) else found, name, value)

    return change


def test_a_good_host_has_none() -> None:
    assert concerns(good()) == []


def test_a_host_without_anything_has_none() -> None:
    assert concerns(Status(host="a", version="1", time=NOW)) == []


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            pair(state="halted", state_reason="the lease ended"),
            "Pair web is halted (the lease ended): this host may not",
        ),
        (pair(state="passthrough"), "Pair web runs on this host alone, without protection: the next failure stops it."),
        (
            pair(state="promoted", state_reason="granted"),
            "Pair web runs on this host alone, without protection (granted): the next",
        ),
        (pair(alone_pending=True), "Pair web: the other host is lost, and arbiter etcd has not said who goes on"),
        (pair(silent=True), "Pair web: this host's right to speak has ended, so what its guest sends is dropped."),
        (pair(engine_ready=False), "Pair web: engine model can't be asked for checkpoints."),
        (pair(mode="periodic", mode_reason="20 requests in 2 s"), "Pair web is in periodic mode: 20 requests in 2 s."),
        (pair(arbiter="none"), "Pair web has no arbiter: its secondary never takes over by itself"),
        (
            pair(disk=dataclasses.replace(DISK, free=99 << 20)),
            "Pair web: only 99.0 MiB are left for the overlays of /i/web.img",
        ),
        (pair(disk=dataclasses.replace(DISK, uncommitted=True)), "Pair web: /i/web.img is not whole without its"),
        (of("peer", connected=False), "There is no link to b"),
        (of("peer", connected=False, patience_ms=3210.0), "The service of b restarts: for 3.2 s more"),
        (of("paths", alive=False), "No heartbeat comes on fwd0: if the other paths are lost too, the arbiter decides."),
        (of("certificates", expires=NOW + 29.4 * DAY_S), "host.pem ends in 29 days: make new ones"),
        (of("certificates", expires=NOW - 1), "host.pem has expired"),
    ],
)
def test_a_concern(change: Callable[[Status], None], sentence: str) -> None:
    status = good()
    change(status)
    (found,) = concerns(status)
    assert found.startswith(sentence)
    assert found.endswith(".")


def test_a_disk_with_room() -> None:
    status = good()
    pair(disk=DISK)(status)
    assert concerns(status) == []


def test_an_engine_that_is_not_asked_need_not_be_ready() -> None:
    status = good()
    pair(state="unprotected", engine_ready=False)(status)
    assert concerns(status) == []
