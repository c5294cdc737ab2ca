"""Events of the ring buffer as dicts: what an operator and a rule read."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from coloebpf.events import event_of, flow_of


@dataclass
class Key:
    """struct flow_key, as ctypes shows it."""

    proto: int = 6
    kind: int = 1
    guest_port: int = socket.htons(443)
    remote_port: int = socket.htons(50_000)
    vlan: tuple[int, int] = (0, 0)
    guest: bytes = bytes(10) + b"\xff\xff" + bytes([10, 77, 0, 10])
    remote: bytes = bytes(10) + b"\xff\xff" + bytes([192, 0, 2, 1])


@dataclass
class Event:
    """struct event, likewise."""

    kind: int = 1
    reason: int = 0
    time_ns: int = 12
    nic: int = 2
    flow: int = 77
    epoch: int = 3
    offset: int = 4000
    pvm_digest: int = 0x1234
    svm_digest: int = (1 << 64) - 1
    key: Key = field(default_factory=Key)


FLOW = {
    "proto": 6,
    "guest": "10.77.0.10",
    "guest_port": 443,
    "remote": "192.0.2.1",
    "remote_port": 50_000,
    "vlans": [],
}
GUEST_6, REMOTE_6 = bytes.fromhex("fd77") + bytes(13) + b"\x10", bytes.fromhex("20010db8") + bytes(11) + b"\1"


@pytest.mark.parametrize(
    ("key", "differs"),
    [
        (Key(), {}),
        (Key(guest=GUEST_6, remote=REMOTE_6), {"guest": "fd77::10", "remote": "2001:db8::1"}),
        (Key(proto=17, guest_port=socket.htons(53)), {"proto": 17, "guest_port": 53}),
        (Key(proto=1, guest_port=0, remote_port=0), {"proto": 1, "guest_port": 0, "remote_port": 0}),
        (Key(guest=bytes(16), remote=bytes(16)), {"guest": "::", "remote": "::"}),
        (Key(vlan=(0x1000 | 100, 0)), {"vlans": [100]}),
        (Key(vlan=(0x9000 | 4094, 0x1000 | 7)), {"vlans": [4094, 7]}),
        (Key(vlan=(0x1000, 0)), {"vlans": [0]}),  # a priority tag: there, with id 0
    ],
)
def test_flows(key: Key, differs: dict[str, Any]) -> None:
    assert flow_of(key) == FLOW | differs


@pytest.mark.parametrize(
    ("raw", "kind", "reason"),
    [
        (Event(kind=1, reason=0), "divergence", "payload"),
        (Event(kind=1, reason=8), "divergence", "structure"),
        (Event(kind=2, reason=0), "high_water", "no_slot"),
        (Event(kind=2, reason=1), "high_water", "fifo_full"),
        (Event(kind=3, reason=6), "timeout", "missing_on_svm"),
        (Event(kind=3, reason=7), "timeout", "missing_on_pvm"),
        (Event(kind=9, reason=99), "9", "99"),  # of a newer dataplane: told as numbers
    ],
)
def test_kinds_and_reasons(raw: Event, kind: str, reason: str) -> None:
    got = event_of(raw)
    assert (got["kind"], got["reason"]) == (kind, reason)


def test_all_of_an_event() -> None:
    assert event_of(Event()) == {
        "kind": "divergence",
        "reason": "payload",
        "time_ns": 12,
        "nic": 2,
        "epoch": 3,
        "offset": 4000,
        "pvm_digest": "0000000000001234",
        "svm_digest": "ffffffffffffffff",
        "flow_number": 77,
        "flow": FLOW,
    }
