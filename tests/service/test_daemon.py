"""What `coloebpf run` asks of systemd itself."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from coloebpf.service.daemon import SYSTEMCTL_S, host_ends

UNDER_SYSTEMD = {"NOTIFY_SOCKET": "/run/systemd/notify"}


@pytest.mark.parametrize(
    ("says", "ends"),
    [("echo stopping; exit 1", True), ("echo running", False), ("echo degraded; exit 1", False), ("sleep 9", False)],
)
def test_an_end_of_the_host_is_no_restart(
    says: str, ends: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "systemctl"
    fake.write_text(f"#!/bin/sh\n[ $1 = is-system-running ] || exit 9\nexec 2>&-\n{says}\n")
    fake.chmod(0o700)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    async def ask() -> bool:
        async with asyncio.timeout(SYSTEMCTL_S + 2):
            return await host_ends(UNDER_SYSTEMD)

    assert asyncio.run(ask()) is ends
    assert not asyncio.run(host_ends({}))


def test_without_systemctl_an_end_counts_as_a_restart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not asyncio.run(host_ends(UNDER_SYSTEMD))
