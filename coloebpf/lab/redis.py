"""The real server and clients of `lab show`: redis, which answers the same commands alike in every replica."""

from __future__ import annotations

import socket
import subprocess
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import IO

from coloebpf.errors import LabError
from coloebpf.lab.plan import LabPlan
from coloebpf.netns import inside

PORT = 6379
CLIENTS = 50
START_TIMEOUT = 5.0  # seconds for a server to listen
# TIME in a form that has always the same length: nothing copies a process, so its stream must fit the other's.
CLOCK = "local t = redis.call('TIME') return string.format('%010d.%06d', t[1], t[2])"
NIL = b"-1"  # the answer for a key without a value
ANSWER_TIMEOUT = 5.0  # seconds for a single answer, several TCP retransmissions
# Nothing that writes files, and one thread, so that replicas differ in nothing but what they are told.
SERVER = (
    *("redis-server", "--port", str(PORT), "--bind", "*", "-::*", "--protected-mode", "no"),
    *("--save", "", "--appendonly", "no", "--io-threads", "1"),
)


@dataclass(frozen=True)
class Load:
    """One run of redis-benchmark."""

    label: str
    requests: int
    pipeline: int
    command: tuple[str, ...]
    v6: bool = False


class Connection:
    """One client connection from a node, speaking redis' protocol."""

    def __init__(
        self,
        plan: LabPlan,
        node: str,
        address: str,
        start_timeout: float = START_TIMEOUT,
        answer_timeout: float = ANSWER_TIMEOUT,
    ) -> None:
        self._answer_timeout = answer_timeout
        deadline = time.monotonic() + start_timeout
        while True:
            try:
                with inside(plan.namespace(node)):  # a socket stays in the namespace where it was made
                    self._socket = socket.create_connection((address, PORT), timeout=answer_timeout)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise LabError(f"redis at {address} can't be reached from {node}: {error}") from error
                time.sleep(0.05)
        self._input: IO[bytes] = self._socket.makefile("rb")

    def ask(self, *words: str) -> bytes:
        """Send a command and return its answer: the line, or the string that follows it."""
        self.send(*words)
        return self.answer()

    def send(self, *words: str) -> None:
        parts = [f"*{len(words)}\r\n", *(f"${len(word)}\r\n{word}\r\n" for word in words)]
        self._socket.sendall("".join(parts).encode())

    def answer(self) -> bytes:
        line = self._input.readline()
        if not line:
            raise LabError("redis closed the connection")
        if line.startswith(b"$") and line != b"$-1\r\n":
            return self._input.read(int(line[1:]) + 2)[:-2]
        return line[1:-2]

    def ask_list(self, *words: str) -> list[str]:
        """Send a command whose answer is an array of strings."""
        count = self.ask(*words)
        if not count.isdigit():
            raise LabError(f"redis answers {words[0]} with {count.decode()}")
        return [self.answer().decode() for _ in range(int(count))]

    def silent_for(self, seconds: float) -> bool:
        """Whether not one byte comes in that time."""
        self._socket.settimeout(seconds)
        try:
            self._socket.recv(1, socket.MSG_PEEK)
            return False
        except TimeoutError:
            return True
        finally:
            self._socket.settimeout(self._answer_timeout)

    def close(self) -> None:
        self._input.close()
        self._socket.close()

    def interrupt(self) -> None:
        """Whoever waits for an answer, in another thread, gets none."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)

    def abort(self) -> None:
        """Close with a RST."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        self.close()


def benchmark(plan: LabPlan, load: Load, address: str) -> subprocess.Popen[str]:
    """Start redis-benchmark on the client's node."""
    with inside(plan.namespace("client")):
        return subprocess.Popen(
            [
                *("redis-benchmark", "-h", address, "-p", str(PORT), "-c", str(CLIENTS)),
                *("-n", str(load.requests), "-P", str(load.pipeline), "--csv", *load.command),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )


def requests_served(info: bytes) -> int:
    """The number of commands that a server has processed, out of its answer to INFO."""
    for line in info.decode().splitlines():
        key, _, value = line.partition(":")
        if key == "total_commands_processed":
            return int(value)
    raise LabError("redis' INFO names no total_commands_processed")
