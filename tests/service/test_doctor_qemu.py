"""`coloebpf doctor` about a host with the engine qemu: each lack is found, with what to do about it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from coloebpf.model import Role
from coloebpf.service.checks import qemu
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.config import Address, Config, PairConfig, QemuConfig, QemuDisk, parse
from coloebpf.service.config_example import example

GREETING = {"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": ""}, "capabilities": []}}
DISKS = [
    {"device": "cd", "inserted": {"node-name": "cd", "ro": True}},
    {"device": "", "qdev": "disk", "inserted": {"node-name": "data", "ro": False}},
]


class Monitor:
    """QEMU's, with two disks. `busy`: it serves another client."""

    def __init__(self, path: Path, busy: bool = False) -> None:
        self._server = socket.socket(socket.AF_UNIX)
        self._server.bind(str(path))
        self._server.listen(8)
        self._thread = None if busy else threading.Thread(target=self._serve, daemon=True)
        if self._thread is not None:
            self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.sendall(json.dumps(GREETING).encode() + b"\n")
                while text := client.recv(1 << 16):  # one command: each waits for the answer to the one before
                    asked = json.loads(text)
                    answer = DISKS if asked["execute"] == "query-block" else {}
                    reply = {"return": answer} | {key: asked[key] for key in ("id",) if key in asked}
                    client.sendall(json.dumps(reply).encode() + b"\n")

    def close(self) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()
        if self._thread is not None:
            self._thread.join(60)


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory whose sockets have names that are short enough."""
    path = Path(tempfile.mkdtemp(prefix="coloebpf-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture
def pair(short: Path) -> PairConfig:
    """Of a host on which all is well but the guest's monitor."""
    (pair,) = parse(example(), Path("example")).pairs
    for program in ("qemu-system-x86_64", "qemu-storage-daemon"):
        (short / program).touch(0o755)
    config = QemuConfig(
        qmp=short / "web.qmp", command=("qemu-system-x86_64", "-qmp", "unix:{qmp}"), listen=Address("127.0.0.1", 0),
        run_dir=short / "run", disk_listen=Address("127.0.0.1", 0), disks=(QemuDisk(node="data", directory=short / "data"),),
    )  # fmt: skip
    return dataclasses.replace(pair, engine="qemu", role=Role.PRIMARY, libxl_colo=None, qemu=config)


def found(short: Path, pair: PairConfig, **changes: Any) -> list[Finding]:
    assert pair.qemu is not None
    pair = dataclasses.replace(pair, qemu=dataclasses.replace(pair.qemu, **changes))
    config: Config = dataclasses.replace(parse(example(), Path("example")), pairs=(pair,))
    return list(qemu.engine(Host(now=0.0, path=str(short), config=config)))


def test_a_good_host_has_nothing_but_ok(short: Path, pair: PairConfig) -> None:
    monitor = Monitor(short / "web.qmp")
    findings = found(short, pair)
    monitor.close()
    assert [f for f in findings if f.level != OK] == []
    assert any("each disk that it writes is replicated" in f.text for f in findings)


def test_without_such_a_pair_nothing_is_asked_for() -> None:
    config = parse(example(), Path("example"))
    assert [f.text for f in qemu.engine(Host(now=0.0, config=config))] == ["no pair uses qemu"]


def lacks(program: str) -> Callable[[Path], object]:
    return lambda short: (short / program).unlink()


def nothing(short: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "changes", "level", "text", "advice"),
    [
        (lacks("qemu-system-x86_64"), {}, FAIL, "qemu-system-x86_64 of pair web is not there", "apt-get install qemu-system-x86"),
        (lacks("qemu-storage-daemon"), {}, FAIL, "qemu-storage-daemon of pair web is not there", "apt-get install qemu-system-common"),
        (nothing, {"command": ("qemu-storage-daemon",)}, WARN, "names no qemu-system-", "docs/qemu.md"),
        (lambda short: (short / "run").touch(), {}, FAIL, "can't be written: pair web needs", "choose another [pair.qemu] run_dir"),
        (lambda short: (short / "data").touch(), {}, FAIL, "can't be written: pair web needs", "choose another [pair.qemu] disk.directory"),
        (nothing, {"listen": Address("192.0.2.1", 7790)}, FAIL, "nobody can listen at 192.0.2.1:7790", "correct [pair.qemu] listen of pair web"),
        (nothing, {"disks": ()}, FAIL, "disk disk of pair web can be written and is not replicated", "[[pair.qemu.disk]]"),
    ],
)  # fmt: skip
def test_a_host_that_lacks_something(
    short: Path, pair: PairConfig, prepare: Callable[[Path], object], changes: dict[str, Any], level: str, text: str, advice: str
) -> None:  # fmt: skip
    prepare(short)
    monitor = Monitor(short / "web.qmp")
    findings = found(short, pair, **changes)
    monitor.close()
    (finding,) = [f for f in findings if f.level != OK]
    assert finding.level == level
    assert text in finding.text
    assert advice in finding.advice


def test_a_guest_that_does_not_run(short: Path, pair: PairConfig) -> None:
    (finding,) = [f for f in found(short, pair) if f.level != OK]
    assert (finding.level, "no QEMU answers at" in finding.text) == (FAIL, True)
    assert f"-qmp unix:{short}/web.qmp" in finding.advice


def test_a_monitor_that_the_service_talks_to_is_good(
    short: Path, pair: PairConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("coloebpf.service.engines.qmp.TIMEOUT_S", 0.1)
    monitor = Monitor(short / "web.qmp", busy=True)
    findings = found(short, pair)
    monitor.close()
    assert {f.level for f in findings} == {OK}
    assert "talks to somebody else" in findings[-1].text


def test_a_guest_of_its_own_on_the_secondary_is_told(short: Path, pair: PairConfig) -> None:
    pair = dataclasses.replace(pair, role=Role.SECONDARY)
    assert {f.level for f in found(short, pair)} == {OK}
    monitor = Monitor(short / "web.qmp")
    (finding,) = [f for f in found(short, pair) if f.level != OK]
    monitor.close()
    assert (finding.level, "this host is the secondary" in finding.text) == (WARN, True)


def test_an_address_that_is_taken(short: Path, pair: PairConfig) -> None:
    monitor = Monitor(short / "web.qmp")
    with socket.create_server(("127.0.0.1", 0)) as other:
        listen = Address("127.0.0.1", other.getsockname()[1])
        (finding,) = [f for f in found(short, pair, listen=listen) if f.level != OK]
    monitor.close()
    assert (finding.level, finding.text) == (WARN, f"{listen} is taken")
    assert "while this host's service runs" in finding.advice
