"""Real etcd servers for tests: started, frozen, killed, cut off, and gone afterwards."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

START_S = 30.0  # seconds for a cluster to elect a leader on a busy machine


def free_ports(count: int) -> list[int]:
    """Below those that the kernel gives out by itself: nobody's connection takes one before it is listened on."""
    given_out = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    some = range(max(1024, given_out - 10_000), given_out)
    found: list[int] = []
    for port in random.sample(some, len(some)):
        if len(found) == count:
            return found
        with socket.socket() as one, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    raise AssertionError("no port is free")


class Member:
    """One etcd process; its data survives a restart."""

    def __init__(
        self, name: str, directory: Path, client: int, peer: int, cluster: str, listen: str, tls: Sequence[str] = ()
    ) -> None:
        """`tls`: its arguments for that; its name is localhost then, as the certificate has to have it."""
        self.name, self.port, self.url = name, client, f"http://{listen}:{client}"
        self._health = self.url
        if tls:
            self.url, self._health = f"https://localhost:{client}", f"http://127.0.0.1:{free_ports(1)[0]}"
            tls = (*tls, "--listen-metrics-urls", self._health)
        self._directory = directory / name
        self._log = directory / f"{name}.log"
        self._arguments = (
            "etcd", "--name", name, "--data-dir", str(self._directory),
            "--listen-client-urls", self.url.replace("localhost", "127.0.0.1"),
            "--advertise-client-urls", self.url, "--listen-peer-urls", f"http://127.0.0.1:{peer}",
            "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}", "--initial-cluster", cluster,
            "--logger", "zap", *tls,
        )  # fmt: skip
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(self._arguments, stdout=log, stderr=log)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

    def freeze(self) -> None:
        """Returns when all its threads stand still: the signal alone waits until one of them is on a CPU."""
        self.signal(signal.SIGSTOP)
        assert self._process is not None
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED | os.WNOWAIT)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def mend(self) -> None:
        """Whatever was done to it, it answers again."""
        if self._process is not None and self._process.poll() is None:
            self.thaw()
        else:
            self.kill()
            self.start()
        self.wait()

    def wipe(self) -> None:
        """As if it had lost its disk."""
        self.kill()
        shutil.rmtree(self._directory)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._health}/health", timeout=1) as answer:
                return b'"true"' in answer.read()
        except OSError:
            return False

    def wait(self) -> None:
        end = time.monotonic() + START_S
        while not self.healthy():
            assert time.monotonic() < end, self._log.read_text()[-2000:]
            time.sleep(0.05)


def cluster(directory: Path, size: int, listen: str = "127.0.0.1", tls: Sequence[str] = ()) -> list[Member]:
    """Members that were started and answer."""
    ports = free_ports(2 * size)
    names = [f"m{number}" for number in range(size)]
    together = ",".join(f"{name}=http://127.0.0.1:{ports[size + i]}" for i, name in enumerate(names))
    members = [
        Member(name, directory, ports[i], ports[size + i], together, listen, tls) for i, name in enumerate(names)
    ]
    for member in members:
        member.start()
    for member in members:
        member.wait()
    return members


def end(members: Sequence[Member]) -> None:
    for member in members:
        member.kill()
