"""A lab's records as text."""

from __future__ import annotations

from typing import Any

import pytest

from coloebpf.lab.report import DIFFERENCES, event_text
from coloebpf.model import REASONS


def event(**changed: Any) -> dict[str, Any]:
    flow = {"proto": 6, "guest": "10.77.0.10", "guest_port": 6379, "remote": "10.77.0.1", "remote_port": 40312}
    plain = {
        "kind": "divergence",
        "reason": "payload",
        "nic": 0,
        "epoch": 3,
        "offset": 4711,
        "pvm_digest": "00000000000000aa",
        "svm_digest": "00000000000000bb",
        "flow": {**flow, "vlans": [], **changed.pop("flow", {})},
    }
    return {**plain, **changed}


@pytest.mark.parametrize(
    ("change", "first", "second"),
    [
        (
            {},
            "divergence: the bytes differ; TCP 10.77.0.10:6379 to 10.77.0.1:40312",
            "at stream position 4711, epoch 3: primary 00000000000000aa, secondary 00000000000000bb",
        ),
        (
            {"reason": "datagram", "offset": 90, "flow": {"proto": 17, "guest": "fd77::10", "remote": "fd77::1"}},
            "divergence: the datagrams differ; UDP [fd77::10]:6379 to [fd77::1]:40312",
            "90 bytes, epoch 3: primary 00000000000000aa, secondary 00000000000000bb",
        ),
        (
            {"flow": {"proto": 132}},
            "divergence: the bytes differ; protocol 132 10.77.0.10:6379 to 10.77.0.1:40312",
            None,
        ),
        ({"reason": "23"}, "divergence: 23; TCP 10.77.0.10:6379 to 10.77.0.1:40312", None),
    ],
)
def test_a_divergence_in_words(change: dict[str, Any], first: str, second: str | None) -> None:
    lines = event_text(event(**change)).splitlines()
    assert lines[0] == first
    assert second is None or lines[1].strip() == second


def test_there_are_words_for_each_reason() -> None:
    assert set(DIFFERENCES) == set(REASONS)
