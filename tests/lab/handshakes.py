"""Clients whose handshakes differ in every machine, for random numbers are in them: TLS to redis, and SSH."""

from __future__ import annotations

import socket
import ssl
import subprocess
import time

from coloebpf.lab import image
from coloebpf.lab.plan import LabPlan
from coloebpf.netns import inside

TLS_PORT = 6380  # coloebpf/lab/guest_init.sh
PATIENCE = 60.0  # seconds for one answer; each may need several checkpoints


class Tls:
    """A connection, and how long it took to be there, in seconds."""

    def __init__(self, plan: LabPlan) -> None:
        context = ssl.create_default_context(cafile=str(image.keys() / "ca.pem"))
        began = time.monotonic()
        with inside(plan.namespace("client")):
            plain = socket.create_connection((plan.nic_list()[0].guest_v4, TLS_PORT), timeout=PATIENCE)
        self._socket = context.wrap_socket(plain, server_hostname=image.TLS_NAME)
        self.seconds = time.monotonic() - began

    def ping(self) -> float:
        """Returns how long the answer took, in seconds."""
        began = time.monotonic()
        self._socket.sendall(b"PING\r\n")
        answer = self._socket.recv(64)
        assert answer == b"+PONG\r\n", answer
        return time.monotonic() - began

    def close(self) -> None:
        self._socket.close()


def ssh(plan: LabPlan, command: str) -> tuple[str, float]:
    """What a command in the guest says, and how long login, command and logout took, in seconds."""
    argv = ["dbclient", "-y", "-y", "-i", str(image.keys() / image.CLIENT_KEY)]
    began = time.monotonic()
    with inside(plan.namespace("client")):
        done = subprocess.run(
            [*argv, f"root@{plan.nic_list()[0].guest_v4}", command],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=PATIENCE, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, time.monotonic() - began
