"""What the engine qemu needs of a host: QEMU, the guest's monitor, room for its files, and addresses to listen at.

What is asked for is in docs/qemu.md.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coloebpf.errors import EngineError
from coloebpf.model import Role
from coloebpf.service.checks.finding import FAIL, OK, WARN, Finding, Host
from coloebpf.service.config import Address, PairConfig, QemuConfig
from coloebpf.service.engines.qemu_disks import DAEMON
from coloebpf.service.engines.qemu_mirror import Mirrors, unreplicated
from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.service.engines.qmp import Qmp

EMULATOR = "qemu-system-"
LOOK_S = 1.0  # for somebody to take a connection


def engine(host: Host) -> Iterator[Finding]:
    """The engine could start."""
    pairs = [(pair, pair.qemu) for pair in host.known.pairs if pair.engine == "qemu" and pair.qemu is not None]
    if not pairs:
        yield Finding(OK, "no pair uses qemu")
    for pair, config in pairs:
        yield from _programs(host, pair, config)
        yield from _directories(host, pair, config)
        yield from _addresses(pair, config)
        yield from _guest(pair, config)


def _programs(host: Host, pair: PairConfig, config: QemuConfig) -> Iterator[Finding]:
    emulators = [word for word in config.command if Path(word).name.startswith(EMULATOR)]
    if not emulators:
        yield Finding(WARN, f"command of pair {pair.name} names no {EMULATOR}...", "compare it with docs/qemu.md")
    needed = dict.fromkeys((config.command[0], *emulators[:1]), "qemu-system-x86")
    if config.disks:
        needed[DAEMON] = "qemu-system-common"
    for program, package in needed.items():
        path = shutil.which(program, path=host.path)
        if path is None:
            yield Finding(
                FAIL,
                f"{program} of pair {pair.name} is not there",
                f"apt-get install {package}, or correct the command",
            )
        else:
            yield Finding(OK, f"{program} is there ({path})")


def _directories(host: Host, pair: PairConfig, config: QemuConfig) -> Iterator[Finding]:
    for key, wanted in (("run_dir", config.run_dir), *(("disk.directory", disk.directory) for disk in config.disks)):
        there = host.at(wanted)
        while not there.exists():
            there = there.parent
        if there.is_dir() and os.access(there, os.W_OK | os.X_OK):
            yield Finding(OK, f"{wanted} can be written")
        else:
            advice = f"make it writable, or choose another [pair.qemu] {key}"
            yield Finding(FAIL, f"{there} can't be written: pair {pair.name} needs {wanted}", advice)


def _addresses(pair: PairConfig, config: QemuConfig) -> Iterator[Finding]:
    keys = [("listen", config.listen)]
    if config.disks and config.disk_listen is not None:
        keys.append(("disk_listen", config.disk_listen))
    for key, address in keys:
        yield free_address(f"[pair.qemu] {key} of pair {pair.name}", address)


def free_address(what: str, address: Address) -> Finding:
    """Somebody could listen there."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return Finding(
                WARN,
                f"{address} is taken",
                f"that is so while this host's service runs; if it does not: choose another {what}",
            )
        return Finding(
            FAIL, f"nobody can listen at {address} ({error.strerror})", f"correct {what}, or the host's addresses"
        )
    return Finding(OK, f"{address} is free")


def _guest(pair: PairConfig, config: QemuConfig) -> Iterator[Finding]:
    path = Vms.of(pair, config, None).monitor()
    answers = _answers(path)
    if pair.role is Role.SECONDARY:
        if answers:
            yield Finding(
                WARN,
                f"a QEMU answers at {path}, and this host is the secondary of pair {pair.name}",
                "the next protection ends it: shut the guest down here, if it runs on the other host",
            )
        return
    if not answers:
        yield Finding(
            FAIL,
            f"no QEMU answers at {path}, so the guest of pair {pair.name} can't be protected",
            f"start it with -qmp unix:{path},server=on,wait=off, or correct [pair.qemu] qmp",
        )
        return
    try:
        reason = asyncio.run(_refusal(pair, config, path))
    except EngineError:  # its monitor serves one client at a time
        yield Finding(OK, f"the QEMU at {path} talks to somebody else: this host's service, if that runs")
        return
    if reason is None:
        yield Finding(OK, f"the QEMU at {path} answers, and each disk that it writes is replicated")
    else:
        advice = "give it a table [[pair.qemu.disk]] on both hosts, or make it read-only"
        yield Finding(FAIL, f"{reason} of pair {pair.name} can be written and is not replicated", advice)


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as monitor:
        monitor.settimeout(LOOK_S)
        try:
            monitor.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        except (TimeoutError, BlockingIOError):
            return True  # others wait there
    return True


async def _refusal(pair: PairConfig, config: QemuConfig, path: Path) -> str | None:
    def unheard(name: str, data: Any) -> None:
        pass

    qmp = Qmp(f"the QEMU of {pair.name}", unheard, lambda: None)
    await qmp.connect(path)
    try:
        return unreplicated(await qmp.do("query-block"), Mirrors(config))
    finally:
        await qmp.close()
