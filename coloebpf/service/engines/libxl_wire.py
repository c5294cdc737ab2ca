"""libxl's protocol with a userspace COLO proxy: the bytes, and the sockets that carry them."""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import sys
import time
from pathlib import Path

from coloebpf.errors import ConfigError, WireError

INIT = b"COLO_USERSPACE_PROXY_INIT"  # libxl: right after connect
INIT_ANSWER = b"COLO_COMPARE_GET_XEN_INIT"  # ours; libxl waits 500 ms for it
COLO_CHECKPOINT = b"COLO_CHECKPOINT"  # libxl: the secondary has the whole state, the PVM is about to go on
DO_CHECKPOINT = b"DO_CHECKPOINT\0"  # ours; libxl compares with strcmp() in a buffer that still holds the last message

_HEADER = struct.Struct(">I")
_BY_LENGTH = {len(body): body for body in (INIT, COLO_CHECKPOINT)}

_SO_TIMESTAMPNS = 35  # asm-generic/socket.h; of x86 and ARM alike
_TIMESPEC = struct.Struct("@ll")
_TCP_ESTABLISHED = "01"  # /proc/net/tcp, column st


def frame(body: bytes) -> bytes:
    """Header and body as one piece: libxl reads each with a single recv, so two sends could make it lose its place."""
    return _HEADER.pack(len(body)) + body


class Reader:
    """Puts libxl's messages together from pieces no longer than `wanted`: a header is always a piece of its own.

    `adopted`: the connection comes from a process that was killed. That one may have read a header and not yet the
    body (libxl sends them apart), so the first thing may be a body alone; no header looks like the beginning of one.
    """

    def __init__(self, adopted: bool = False) -> None:
        self._data = b""
        self._body = b""  # that the header announced
        self._maybe_headless = adopted

    @property
    def in_message(self) -> bool:
        """A message has begun and is not whole."""
        return bool(self._data or self._body)

    @property
    def wanted(self) -> int:
        """How many bytes to read next, at most."""
        return (len(self._body) or _HEADER.size) - len(self._data)

    def feed(self, piece: bytes) -> bytes | None:
        """The message's body once it is whole. Raises WireError for what libxl never sends; that is the end then."""
        self._data += piece
        if not self._body:
            if len(self._data) < _HEADER.size:
                return None
            headless = self._maybe_headless and COLO_CHECKPOINT.startswith(self._data)
            self._maybe_headless = False
            if headless:
                self._body = (
                    COLO_CHECKPOINT  # INIT comes but once; if its header was read before, its start fails anyway
                )
            else:
                length = _HEADER.unpack(self._data)[0]
                if length not in _BY_LENGTH:
                    raise WireError(f"a message of {length} bytes, which libxl does not have")
                self._body, self._data = _BY_LENGTH[length], b""
        if not self._body.startswith(self._data):
            raise WireError(f"{self._data!r} instead of {self._body.decode()}")
        if self._data != self._body:
            return None
        body, self._data, self._body = self._body, b"", b""
        return body


def check_loopback(host: str) -> None:
    """Raises ConfigError unless libxl can connect to `host`, and nobody from outside can."""
    try:
        address = ipaddress.IPv4Address(host)
    except ValueError as e:
        raise ConfigError(f"listen on {host!r}: libxl takes an IPv4 address only; 127.0.0.1 would be right") from e
    if not address.is_loopback:
        raise ConfigError(
            f"listen on {host}: libxl's protocol has no authentication, so no other host may reach it; "
            "127.0.0.1 would be right"
        )


def prepare(tcp: socket.socket) -> None:
    """Sets up a listener, whose connections inherit it, or a connection that is new to this process.

    The first socket of a machine that wants arrivals stamped may get none for some ms, so the listener asks already.
    """
    tcp.setblocking(False)
    tcp.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    tcp.setsockopt(socket.SOL_SOCKET, _SO_TIMESTAMPNS, 1)


def hurry(connection: socket.socket) -> None:
    """Has what was read acknowledged at once, and what comes next: libxl's body waits for our ACK of its header.

    libxl leaves Nagle's algorithm on and sends header and body apart. With a delayed ACK (40 ms) the PVM runs long
    before its COLO_CHECKPOINT is here. The kernel forgets TCP_QUICKACK: call again after each read and write.
    """
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def read(connection: socket.socket, limit: int) -> tuple[bytes, int]:
    """Up to `limit` bytes, and when the last of them arrived at the kernel, CLOCK_MONOTONIC ns; 0 if that is not known.

    Bytes that waited together have the last one's time. So a header that waited for longer than the delayed ACK that
    lets the body come (40 ms, and none while the kernel acknowledges at once) looks that much younger.
    b"" at the end of file. Raises OSError, BlockingIOError too.
    """
    data, ancillary, _, _ = connection.recvmsg(limit, socket.CMSG_SPACE(_TIMESPEC.size))
    for level, kind, value in ancillary:
        if level == socket.SOL_SOCKET and kind == _SO_TIMESTAMPNS:
            seconds, ns = _TIMESPEC.unpack(value[: _TIMESPEC.size])
            age = time.time_ns() - (seconds * 10**9 + ns)
            return data, time.monotonic_ns() - age if age >= 0 else 0  # below 0 the clock was set meanwhile
    return data, 0


def owner(connection: socket.socket, table: Path = Path("/proc/self/net/tcp")) -> int | None:
    """The user id that holds the other end of a loopback connection; None if nobody does any more.

    Loopback is open to each user of dom0, and a COLO_CHECKPOINT releases what is held: only root may say it.
    """
    try:
        ours, theirs = _row_address(connection.getsockname()), _row_address(connection.getpeername())
    except OSError:  # reset already
        return None
    for row in table.read_text().splitlines()[1:]:
        column = row.split()
        # Once closed a socket has inode 0 and user 0, whoever it was.
        if column[1] == theirs and column[2] == ours and column[3] == _TCP_ESTABLISHED and column[9] != "0":
            return int(column[7])
    return None


def trusted(user: int | None) -> bool:
    """Root, or whoever runs the service."""
    return user is not None and user in (0, os.geteuid())


def _row_address(address: tuple[str, int]) -> str:
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    return f"{number:08X}:{address[1]:04X}"
