"""QEMU's colo-compare alone: a QEMU without machine and guest, sockets as its ports."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.bench.errors import BenchError
from tests.bench.feeder import OTHER_CPU, Ports

QEMU = "qemu-system-x86_64"
START_S = 10.0
PORTS = ("primary", "secondary", "client", "notify")


def version(qemu: str = QEMU) -> str:
    """QEMU's own first line about itself."""
    if shutil.which(qemu) is None:
        raise BenchError(f"{qemu} is missing: apt-get install qemu-system-x86")
    return subprocess.run([qemu, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]


class ColoCompare:
    """A running colo-compare, pinned to the CPU that the feeder leaves free.

    It serves one feeder in its life, as with a guest: it keeps its connections, so each run starts a new one.
    """

    name = "colo-compare"

    def __init__(self, guest_mac: str, client_mac: str, qemu: str = QEMU, proc: Path = Path("/proc")) -> None:
        """The MACs are those of the other targets, so that the frames are the same."""
        self._macs = (guest_mac, client_mac)
        self._qemu = qemu
        self._proc = proc
        self._directory = tempfile.TemporaryDirectory(prefix="colo-compare.")
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        """Starts it and waits for its sockets."""
        compare = "colo-compare,id=compare,primary_in=primary,secondary_in=secondary,outdev=client,notify_dev=notify"
        command = ["taskset", "-c", str(OTHER_CPU), self._qemu, "-machine", "none", "-nodefaults", "-display", "none"]
        command += ["-monitor", "none", "-name", "bench,debug-threads=on"]
        for port in PORTS:
            command += ["-chardev", f"socket,id={port},path={self._path(port)},server=on,wait=off"]
        command += ["-object", "iothread,id=io", "-object", f"{compare},iothread=io"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        try:
            self._wait(self._process)
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stops it."""
        if self._process:
            self._process.kill()
            self._process.communicate()
        self._directory.cleanup()

    def ports(self) -> Ports:
        """Where the feeder connects."""
        primary, secondary, client, notify = (str(self._path(port)) for port in PORTS)
        return Ports(primary, secondary, client, *self._macs, stream=True, notify=notify)

    def meter(self) -> Mapping[str, float]:
        """CPU time of all its threads: as the scheduler counts it (ns), and the user share of it (s, in ticks)."""
        assert self._process is not None
        process = self._proc / str(self._process.pid)
        cpu_ns = 0
        for task in (process / "task").iterdir():
            with contextlib.suppress(FileNotFoundError):  # a thread may end meanwhile
                cpu_ns += int((task / "schedstat").read_text().split()[0])
        # fields are counted behind the command's name, which is in parentheses and may hold spaces; utime is field 14
        user_ticks = int((process / "stat").read_text().rpartition(")")[2].split()[11])
        return {"cpu_ns": cpu_ns, "user_s": user_ticks / os.sysconf("SC_CLK_TCK")}

    def _path(self, port: str) -> Path:
        return Path(self._directory.name) / f"{port}.sock"

    def _wait(self, process: subprocess.Popen[str]) -> None:
        deadline = time.monotonic() + START_S
        while not all(self._path(port).exists() for port in PORTS):
            if process.poll() is not None:
                raise BenchError(f"{self._qemu} ended: {process.communicate()[0].strip()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self._qemu} made no sockets within {START_S:.0f} s")
            time.sleep(0.02)
        time.sleep(0.2)  # the objects come after the sockets
