"""QEMU's processes: none is left behind that no service knows of."""

from __future__ import annotations

import asyncio
import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from coloebpf.errors import EngineError
from coloebpf.service.engines.qemu_process import ONCE_RECORDED, Processes

SLEEPS = ("/bin/sleep", "3600")  # opens no monitor


def test_a_start_that_is_given_up_while_its_process_is_made_ends_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn, made, go = Processes._spawn, threading.Event(), threading.Event()
    children: list[subprocess.Popen[bytes]] = []

    def slowly(self: Processes, name: str, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        children.append(spawn(self, name, argv))
        made.set()
        assert go.wait(60)
        return children[0]

    async def test() -> None:
        start = asyncio.create_task(Processes(tmp_path, "web").start("0", SLEEPS))
        await asyncio.to_thread(made.wait, 60)
        start.cancel()
        await asyncio.sleep(0)
        go.set()
        with pytest.raises(asyncio.CancelledError):
            await start

    monkeypatch.setattr(Processes, "_spawn", slowly)
    asyncio.run(test())
    assert children[0].poll() is not None
    assert not (tmp_path / "0.json").exists()


def test_a_start_that_is_given_up_while_it_waits_for_the_monitor_ends_the_process(tmp_path: Path) -> None:
    record = tmp_path / "0.json"

    async def test() -> None:
        start = asyncio.create_task(Processes(tmp_path, "web").start("0", SLEEPS))
        async with asyncio.timeout(60):
            while not record.exists():
                await asyncio.sleep(0.01)
        start.cancel()
        with pytest.raises(asyncio.CancelledError):
            await start

    asyncio.run(test())
    assert not record.exists()


def test_a_service_that_is_killed_before_the_record_is_written_leaves_no_process(tmp_path: Path) -> None:
    """All that it has done for the process by then is undone with its end of the pipe."""
    ran = tmp_path / "ran"
    child = subprocess.Popen((*ONCE_RECORDED, "/usr/bin/touch", str(ran)), stdin=subprocess.PIPE)
    assert child.stdin is not None
    child.stdin.close()
    assert child.wait(60) != 0
    assert not ran.exists()


def test_what_can_not_be_run_is_told(tmp_path: Path) -> None:
    async def test() -> None:
        with pytest.raises(EngineError, match=r"/no/qemu of web ended at its start: .*not found"):
            await Processes(tmp_path, "web").start("0", ("/no/qemu",))

    asyncio.run(test())
    assert os.listdir(tmp_path) == ["0.log"]
