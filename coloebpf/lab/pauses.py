"""How long a virtual machine stood still: its QEMU's own STOP and RESUME events, on a monitor of our own."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from coloebpf.errors import LabError

TIMEOUT_S = 5.0  # for the greeting


class Pauses(threading.Thread):
    """Listens at the monitor until it is closed or QEMU ends; `seconds` has each pause so far."""

    def __init__(self, monitor: Path) -> None:
        super().__init__(daemon=True)
        self.seconds: list[float] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        try:
            self._socket.connect(str(monitor))
            self._lines = self._socket.makefile("r")
            self._lines.readline()
            self._socket.sendall(b'{"execute": "qmp_capabilities"}\n')
        except OSError as e:
            raise LabError(f"no QEMU answers at {monitor}: {e}") from e
        self._socket.settimeout(None)

    def run(self) -> None:
        with suppress(OSError, ValueError):  # closed, or cut off within a line
            for pause in between(json.loads(line) for line in self._lines):
                self.seconds.append(pause)

    def close(self) -> None:
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self.join()
        self._socket.close()


def between(messages: Iterable[dict[str, Any]]) -> Iterable[float]:
    """Seconds from each STOP event to the RESUME that follows it, by QEMU's clock."""
    stopped: float | None = None
    for message in messages:
        match message:
            case {"event": "STOP", "timestamp": {"seconds": seconds, "microseconds": rest}}:
                stopped = seconds + rest / 1e6
            case {"event": "RESUME", "timestamp": {"seconds": seconds, "microseconds": rest}} if stopped is not None:
                yield seconds + rest / 1e6 - stopped
                stopped = None
