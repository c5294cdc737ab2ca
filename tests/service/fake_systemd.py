"""Plays systemd's part: listens at a notify socket, keeps descriptors, and hands them to the next process it starts.

As systemd 252 does it: FDSTORE with FDNAME adds, FDSTOREREMOVE removes all of a name, what is kept stays kept when it is
handed out, and messages of a dead process still count.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

LAUNCHER = """
import os, sys
fds, names, command = [int(fd) for fd in sys.argv[1].split(",") if fd], sys.argv[2], sys.argv[3:]
high = [os.dup2(fd, 100 + i) for i, fd in enumerate(fds)]
for i, fd in enumerate(high):
    os.dup2(fd, 3 + i)
os.closerange(100, 200)
if fds:
    os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=names)
os.execv(command[0], command)
"""


class FakeSystemd:
    """One unit's manager. `told`: all messages so far, each as its lines."""

    def __init__(self, directory: Path) -> None:
        self.address = str(directory / "notify")
        self.told: list[list[str]] = []
        self.kept: list[tuple[str, int]] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.setblocking(False)

    def hear(self) -> None:
        """Takes in all messages that were sent."""
        while True:
            try:
                data, fds, _, _ = socket.recv_fds(self._socket, 4096, 16)
            except BlockingIOError:
                return
            lines = data.decode().split("\n")
            self.told.append(lines)
            name = next((line.removeprefix("FDNAME=") for line in lines if line.startswith("FDNAME=")), "stored")
            if "FDSTORE=1" in lines:
                self.kept += [(name, fd) for fd in fds]
            elif "FDSTOREREMOVE=1" in lines:
                for entry in [entry for entry in self.kept if entry[0] == name]:
                    self.kept.remove(entry)
                    os.close(entry[1])

    def start(self, *arguments: str, **how: Any) -> subprocess.Popen[str]:
        """Runs the interpreter with `arguments` as the unit's main process, with what is kept as descriptors 3 and up."""
        self.hear()
        numbers = [fd for _, fd in self.kept]
        return subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, ",".join(map(str, numbers)), ":".join(name for name, _ in self.kept), sys.executable, *arguments],
            env={**os.environ, "NOTIFY_SOCKET": self.address},
            pass_fds=numbers,
            text=True,
            **how,
        )  # fmt: skip

    def close(self) -> None:
        self._socket.close()
        for _, fd in self.kept:
            os.close(fd)
