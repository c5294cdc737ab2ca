"""libxl as the engine meets it, by the reference (shared/reference/xen-libxl-colo.md): its userspace COLO proxy with every habit.

    python -m tests.service.libxl_peer HOST PORT COUNT MILLISECONDS

behaves like xen/peer.c, which drives Xen's own code, and prints the same lines; so one set of tests is for both.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time

BUFFER_BYTES = 1024  # libxl's, on the stack
INIT_WAIT_S, REQUEST_WAIT_S = 0.5, 5.0


class Crash(Exception):
    """What would overwrite xl's stack."""


class Libxl:
    """One session of the primary's libxl: `setup`, then `preresume` and `checkpoint` in turn."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket = socket.socket()  # blocking, Nagle's algorithm on
        self._buffer = bytearray(b"\xa5" * BUFFER_BYTES)  # never cleared, and not of zeros to begin with

    def setup(self) -> int:
        """0, or -1 if nobody answered in time. EOF counts as an answer."""
        self._socket.connect(self._address)
        try:
            self._send(b"COLO_USERSPACE_PROXY_INIT")
            self._receive(INIT_WAIT_S)
        except OSError:
            return -1
        return 0

    def preresume(self) -> None:
        """COLO_CHECKPOINT; nobody cares whether it could be sent."""
        with contextlib.suppress(OSError):
            self._send(b"COLO_CHECKPOINT")

    def checkpoint(self) -> int:
        """Waits for the next one's reason: 1 it was asked for, 0 anything else: time is up, junk, EOF, a broken connection."""
        try:
            if not self._receive(REQUEST_WAIT_S):
                return 0
        except OSError:
            return 0
        text = bytes(self._buffer).split(b"\0")[0]  # strcmp
        return int(text == b"DO_CHECKPOINT")

    def _send(self, body: bytes) -> None:
        self._socket.send(struct.pack(">I", len(body)))
        self._socket.send(body)

    def _receive(self, wait_s: float) -> int:
        """One recv for the header, one for the body, however much of them has come. Bytes of the body."""
        self._socket.settimeout(wait_s)  # SO_RCVTIMEO: for each recv anew
        header = self._socket.recv(4).ljust(4, b"\0")
        (length,) = struct.unpack(">I", header)
        if length == 0:
            return 0
        body = self._socket.recv(length)
        if len(body) > BUFFER_BYTES:
            raise Crash(f"{len(body)} bytes into a buffer of {BUFFER_BYTES}")
        self._buffer[: len(body)] = body
        return len(body)


def main(host: str, port: str, count: str, ms: str) -> int:
    libxl = Libxl(host, int(port))
    result = libxl.setup()
    print("setup", result, time.monotonic_ns(), flush=True)
    if result:
        return 1
    number = 0
    while not int(count) or number < int(count):
        number += 1
        time.sleep(int(ms) / 1000)
        before = time.monotonic_ns()
        libxl.preresume()
        print("checkpoint", number, before, time.monotonic_ns(), flush=True)
        child = os.fork()  # as libxl does: the child holds the socket too
        if not child:
            asked = libxl.checkpoint()
            print("asked", asked, time.monotonic_ns(), flush=True)
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            return 3
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
