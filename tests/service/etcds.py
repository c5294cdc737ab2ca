"""Real etcd servers for tests: started, frozen, killed, cut off, and gone afterwards."""

from __future__ import annotations

import os
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
    held = [socket.socket() for _ in range(count)]
    try:
        for one in held:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in held]
    finally:
        for one in held:
            one.close()


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
        self.signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.signal(signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

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
