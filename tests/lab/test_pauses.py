"""Pauses of a virtual machine out of its monitor's messages, and of a real QEMU."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from coloebpf.errors import LabError
from coloebpf.lab import machine
from coloebpf.lab.pauses import Pauses, between


def event(name: str, seconds: int, microseconds: int = 0) -> dict[str, Any]:
    return {"event": name, "timestamp": {"seconds": seconds, "microseconds": microseconds}}


def test_a_pause_is_from_stop_to_the_next_resume() -> None:
    messages = [
        {"return": {}},
        event("RESUME", 1),
        event("STOP", 2, 999_000),
        event("MIGRATION", 3),
        event("RESUME", 3, 1_000),
        event("STOP", 5),
        event("STOP", 6),
        event("RESUME", 8),
        event("STOP", 9),
    ]
    assert list(between(messages)) == pytest.approx([0.002, 2.0])


@pytest.mark.vm
def test_a_real_machines_pauses_are_seen(tmp_path: Path) -> None:
    if shutil.which(machine.QEMU) is None:
        pytest.skip(f"no {machine.QEMU}: run deploy/install-deps.sh lab")
    first, second = tmp_path / "one", tmp_path / "two"
    sockets = [word for path in (first, second) for word in ("-qmp", f"unix:{path},server=on,wait=off")]
    bare = ["-nodefaults", "-display", "none", "-M", "none", "-accel", "tcg"]
    qemu = subprocess.Popen([machine.QEMU, *bare, *sockets])
    try:
        pauses = opened(second)
        pauses.start()
        monitor = Orders(first)
        asked = time.monotonic()
        monitor.say("stop")
        stopped = time.monotonic()
        time.sleep(0.2)
        going = time.monotonic()
        monitor.say("cont")
        goes = time.monotonic()
        deadline = time.monotonic() + 20
        while not pauses.seconds and time.monotonic() < deadline:
            time.sleep(0.01)
        (pause,) = pauses.seconds
        assert going - stopped <= pause <= goes - asked
        pauses.close()
    finally:
        qemu.kill()
        qemu.wait()


def opened(path: Path) -> Pauses:
    """The socket is there before it listens."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return Pauses(path)
        except LabError:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_no_machine_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="no QEMU answers at"):
        Pauses(tmp_path / "nobody")


class Orders:
    """A monitor that takes commands, one line for each."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("r")
        self._lines.readline()
        self.say("qmp_capabilities")

    def say(self, command: str) -> None:
        self._socket.sendall(b'{"execute": "%s"}\n' % command.encode())
        while '"return"' not in self._lines.readline():
            pass
