"""What the service and systemd tell each other: readiness, watchdog, and sockets that outlive a restart.

The protocol is one datagram of `KEY=value` lines to the socket in $NOTIFY_SOCKET (sd_notify(3)), descriptors go along
by SCM_RIGHTS, and come back from number 3 on, with names (sd_listen_fds(3)). Debian's python3-systemd wraps the same
calls; it is not used since it waits without a limit when systemd does not read, which would stop the event loop, and
since on PyPI it is C source that wants libsystemd's headers. PyPI's sdnotify has no descriptors.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass

from coloebpf.errors import ConfigError, NotifyError

FIRST_FD = 3  # SD_LISTEN_FDS_START
SEND_TIMEOUT_S = 0.1  # systemd's queue of datagrams can be full; the event loop waits no longer than this
_NAME = re.compile(r"[\x21-\x39\x3b-\x7e]{1,255}\Z")  # what systemd's fdname_is_valid() takes, without the space

logger = logging.getLogger("coloebpf.fdstore")


class Notifier:
    """Tells systemd about this service. Without an address (not started by systemd) nothing is sent: no error."""

    def __init__(self, address: str = "", clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._socket: socket.socket | None = None
        if not address:
            return
        if address[0] not in "/@":
            raise ConfigError(f"NOTIFY_SOCKET {address!r} is neither a path nor an abstract name")
        where = "\0" + address[1:] if address[0] == "@" else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(SEND_TIMEOUT_S)
        try:
            self._socket.connect(where)
        except OSError as e:
            self.close()
            raise NotifyError(f"NOTIFY_SOCKET {address!r} can't be reached: {e.strerror}") from e

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] = os.environ) -> Notifier:
        """Raises ConfigError or NotifyError for a $NOTIFY_SOCKET that is of no use."""
        return cls(environ.get("NOTIFY_SOCKET", ""))

    @property
    def active(self) -> bool:
        """Something listens: what is kept will come back."""
        return self._socket is not None

    def close(self) -> None:
        """Nothing is sent from here on."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ready(self, status: str = "") -> None:
        """The service has started, or a reload is done."""
        self._tell("READY=1", *_status(status))

    def reloading(self) -> None:
        """A reload begins; ready() ends it. The time is what Type=notify-reload (systemd 253) asks for."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={self._clock() // 1000}")

    def stopping(self, status: str = "") -> None:
        """The service is about to end."""
        self._tell("STOPPING=1", *_status(status))

    def watchdog(self) -> None:
        """A sign of life; due at least every watchdog_period_s()."""
        self._tell("WATCHDOG=1")

    def status(self, text: str) -> None:
        """One line for `systemctl status`."""
        self._tell(*_status(text))

    def keep(self, name: str, fd: int) -> bool:
        """Has systemd hold a duplicate of `fd` until drop(). False if nobody will: then it dies with this process.

        FDPOLL=0: without it systemd throws a socket away as soon as the other side has reset it, and the next
        process would not hear that there was one.
        """
        return self._tell("FDSTORE=1", f"FDNAME={checked_name(name)}", "FDPOLL=0", fd=fd)

    def drop(self, name: str) -> None:
        """Has systemd close all that was kept as `name`."""
        self._tell("FDSTOREREMOVE=1", f"FDNAME={checked_name(name)}")

    def _tell(self, *lines: str, fd: int | None = None) -> bool:
        if self._socket is None:
            return False
        message = "\n".join(lines).encode()
        try:
            if fd is None:
                self._socket.send(message)
            else:
                socket.send_fds(self._socket, [message], [fd])
        except OSError as e:  # the service works on without systemd's ear
            logger.warning("systemd did not take %r: %s", lines[0], e.strerror or e)
            return False
        return True


def _status(text: str) -> tuple[str, ...]:
    return (f"STATUS={' '.join(text.split())}",) if text else ()


def checked_name(name: str) -> str:
    """`name`, if systemd takes it as a FDNAME. Raises ConfigError otherwise."""
    if not _NAME.match(name):
        raise ConfigError(f"{name!r} can't name a kept descriptor: 1 to 255 printable characters, no space, no colon")
    return name


@dataclass(frozen=True)
class Kept:
    """A descriptor that came back from systemd, under the name it was kept by; the taker closes it."""

    name: str
    fd: int

    def socket(self) -> socket.socket:
        """As a socket, which owns it then. Raises NotifyError if it is something else."""
        try:
            return socket.socket(fileno=self.fd)
        except OSError as e:
            raise NotifyError(f"descriptor {self.fd}, kept as {self.name!r}, is no socket: {e.strerror}") from e

    def close(self) -> None:
        """For one that nobody wants."""
        with contextlib.suppress(OSError):
            os.close(self.fd)


def taken_back(environ: MutableMapping[str, str] = os.environ, pid: int | None = None) -> list[Kept]:
    """What systemd has handed to this process; the variables are removed, so that no child believes them.

    Variables that are for another process, or make no sense, give an empty list.
    """
    meant_for = environ.pop("LISTEN_PID", "")
    count = environ.pop("LISTEN_FDS", "")
    names = environ.pop("LISTEN_FDNAMES", "").split(":")
    if meant_for != str(os.getpid() if pid is None else pid) or not count.isdecimal():
        return []
    if len(names) != int(count):
        logger.warning("LISTEN_FDS says %s descriptors, LISTEN_FDNAMES has %d names", count, len(names))
    kept = []
    for i in range(int(count)):
        fd = FIRST_FD + i
        os.set_inheritable(fd, False)
        kept.append(Kept(names[i] if i < len(names) else "unknown", fd))
    return kept


def watchdog_period_s(environ: Mapping[str, str] = os.environ, pid: int | None = None) -> float:
    """How often watchdog() is due, in seconds: half of what the unit allows. 0: no watchdog is set for this process."""
    limit_us = environ.get("WATCHDOG_USEC", "")
    meant_for = environ.get("WATCHDOG_PID", "")
    if not limit_us.isdecimal() or meant_for not in ("", str(os.getpid() if pid is None else pid)):
        return 0.0
    return int(limit_us) / 1e6 / 2
