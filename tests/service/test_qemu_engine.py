"""The engine qemu, both sides with real QEMUs: checkpoints in a row, and what is left when somebody dies in one."""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from coloebpf.lab import image
from coloebpf.service.engines import (
    qemu_checkpoints,
    qemu_mirror,
    qemu_process,
    qemu_pvm,
    qmp,
    standby,
)
from tests.service.qemu_rig import Rig

pytestmark = [pytest.mark.vm, pytest.mark.real_time]
COUNT = int(os.environ.get("COLOEBPF_CHECKPOINTS", "6"))  # more of them: a measurement

PATIENCE_S = 20.0
LIMITS = {
    qmp: ("TIMEOUT_S",),
    qemu_process: ("START_S",),
    qemu_mirror: ("END_S",),
    qemu_pvm: ("CONNECT_S", "CONT_S"),
    qemu_checkpoints: ("SWITCH_S", "STOP_S", "MOVE_S", "WHOLE_S", "CUT_S", "UNDO_S", "RELEASE_S"),
    standby: ("TOKEN_S", "REACH_S"),
}

Test = Callable[[Rig], Awaitable[None]]


@pytest.fixture
def disk() -> bool:
    """Whether the guest has one."""
    return False


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time limits only bound a hang here: on a busy machine a healthy QEMU may need more than a user would wait for."""
    for module, names in LIMITS.items():
        for name in names:
            monkeypatch.setattr(module, name, PATIENCE_S)


@pytest.fixture
def play(tmp_path: Path, disk: bool, patience: None) -> Callable[[Test], None]:
    """Runs a test with a PVM that counts, and both engines."""
    kernel = image.find_kernel()
    if kernel is None:
        pytest.skip("no linux-image-cloud-amd64 of Debian 12: run deploy/install-deps.sh test")

    def run(test: Test) -> None:
        async def all_of_it() -> None:
            with socket.create_server(("127.0.0.1", 0)) as free:
                port = free.getsockname()[1]
            rig = Rig(kernel, tmp_path, port, disk)
            try:
                await rig.up()
                await test(rig)
            finally:
                await rig.down()

        asyncio.run(all_of_it())

    return run


def test_checkpoints_in_a_row(play: Callable[[Test], None]) -> None:
    """Each standby becomes the SVM, runs once it is committed, and goes on where the PVM was."""

    async def test(rig: Rig) -> None:
        took = []
        for number in range(COUNT):
            if number:
                await rig.until(lambda: rig.primary.filled, "the next copy")
            took.append(await rig.checkpoint())
            await asyncio.sleep(0.05)
            await rig.pvm_runs()
            svm = rig.secondary.svm
            assert await rig.status(svm) == "running"
            assert svm is not None
            assert rig.vifs.now == rig.vifs.vif == (11, 12)[svm.slot]
        await rig.until(lambda: rig.svm_ticks() > 3, "the SVM to count where the PVM was")
        assert len(rig.qemus()) <= 2
        requests, pauses = zip(*took[1:], strict=True)  # the first one copies all of the memory
        print(f"request to commit ms: median {statistics.median(requests):.1f}, worst {max(requests):.1f}")
        print(f"standstill ms: median {statistics.median(pauses):.1f}, worst {max(pauses):.1f}")

    play(test)
