"""The stream of one live migration, from the PVM's QEMU to the standby's, through a gate that opens at once.

QEMU's own limit of bandwidth is looked at every 100 ms only, so a migration that it holds back comes too late when it
is wanted. Here QEMU may always write, and stands still inside its write while the gate is shut: its migration thread
does, the PVM runs. What is between QEMU and the gate is kept small, for it counts as sent.
"""

from __future__ import annotations

import contextlib
import math
import socket
import threading
import time
from collections.abc import Callable

NEAR_BYTES = 8192  # what QEMU may have written and we not read; the kernel takes twice that
FAR_BYTES = 64 << 20  # to the standby: once the PVM stands still, its state must leave QEMU however slow the network is
CHUNK = 1 << 18  # bytes read at a time
PACE_S = 0.002  # shorter sleeps take longer than they should


class Relay:
    """A thread between two sockets. `near`: QEMU's, which gets a duplicate; let_go() ends ours.

    `pace`: bytes per second, 0: none; `shut`: nothing passes. `on_end(reason)` is called in the thread, once: "" after
    QEMU's end of file, else what has broken.
    """

    def __init__(self, far: socket.socket, pace: int, on_end: Callable[[str], None]) -> None:
        self.near, self._here = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, NEAR_BYTES)
        self._far = far
        far.settimeout(None)
        with contextlib.suppress(PermissionError):  # without CAP_NET_ADMIN: what the system lets us have
            far.setsockopt(socket.SOL_SOCKET, 32, FAR_BYTES)  # SO_SNDBUFFORCE
        self.passed = 0  # bytes
        self._pace, self._on_end = pace, on_end
        self._most = math.inf
        self._lock = threading.Lock()  # of _most and the gate, which go together
        self._gate = threading.Event()
        self._gate.set()
        self._end = False
        self._thread = threading.Thread(target=self._run, name="qemu-relay", daemon=True)

    def start(self) -> None:
        """From here on what QEMU writes passes."""
        self._thread.start()

    def open(self, pace: int, most: float = math.inf) -> None:
        """Lets the stream pass, at `pace` bytes per second (0: as fast as it comes), and `most` bytes of it."""
        with self._lock:
            self._pace, self._most = pace, most
            self._gate.set()

    def shut(self) -> None:
        """At most a CHUNK that was read already still passes."""
        self._gate.clear()

    def widen(self) -> None:
        """QEMU need not wait for us any more."""
        self.near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, CHUNK)

    def let_go(self) -> None:
        """QEMU has written all: its end of file is the stream's."""
        self.near.close()

    def close(self) -> None:
        """Breaks both ends; whoever still writes or reads there hears of it."""
        self._end = True
        self._gate.set()
        for end in (self._here, self._far):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        self.near.close()
        if self._thread.ident is None:  # nobody else closes them
            self._here.close()
            self._far.close()

    def _run(self) -> None:
        reason = ""
        try:
            self._pass_on()
        except OSError as e:
            reason = f"the stream to the standby has broken: {e.strerror}"
        finally:
            self._here.close()
            self._far.close()
            self._on_end(reason)

    def _pass_on(self) -> None:
        owed = 0.0  # seconds that what has passed should still take
        while True:
            self._gate.wait()
            if self._end:
                return
            began = time.monotonic()
            data = self._here.recv(CHUNK)
            if not data:
                return
            self._far.sendall(data)
            self.passed += len(data)
            with self._lock:
                self._most -= len(data)
                if self._most <= 0:
                    self._gate.clear()
            pace = self._pace
            owed = max(0.0, owed + len(data) / pace - (time.monotonic() - began)) if pace else 0.0
            if owed > PACE_S:
                time.sleep(owed)
                owed = 0.0
