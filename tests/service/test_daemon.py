"""What `coloebpf run` asks of systemd itself."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from coloebpf.service import daemon
from coloebpf.service.daemon import host_ends

UNDER_SYSTEMD = {"NOTIFY_SOCKET": "/run/systemd/notify"}
PATIENCE_S = 30.0  # for a shell to start on a busy machine


@pytest.fixture
def systemctl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts one in the place of the machine's; it runs the given line."""

    def put(line: str) -> None:
        fake = tmp_path / "systemctl"
        fake.write_text(f"#!/bin/sh\n[ $1 = is-system-running ] || exit 9\nexec 2>&-\n{line}\n")
        fake.chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return put


@pytest.mark.parametrize(
    ("says", "ends"),
    [("echo stopping; exit 1", True), ("echo running", False), ("echo degraded; exit 1", False)],
)
def test_an_end_of_the_host_is_no_restart(
    says: str, ends: bool, systemctl: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(daemon, "SYSTEMCTL_S", PATIENCE_S)
    systemctl(says)
    assert asyncio.run(host_ends(UNDER_SYSTEMD)) is ends
    assert not asyncio.run(host_ends({}))


def test_a_systemctl_that_hangs_is_not_waited_for(systemctl: Callable[[str], None]) -> None:
    systemctl(f"exec sleep {2 * PATIENCE_S:g}")
    began = time.monotonic()
    assert not asyncio.run(host_ends(UNDER_SYSTEMD))
    assert time.monotonic() - began < PATIENCE_S


def test_without_systemctl_an_end_counts_as_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not asyncio.run(host_ends(UNDER_SYSTEMD))
