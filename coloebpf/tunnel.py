"""A process that encrypts one connection: `python -m coloebpf.tunnel SIDE NET PLAIN CA CERTIFICATE KEY NAME`.

SIDE is client or server, NET and PLAIN are descriptors: what comes in at PLAIN leaves by TLS on NET, and the other way
round. The other side must have a certificate of CA for NAME. It outlives the service, as what it carries does. When one
side ends, what is under way is passed on and the other side is closed.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import ssl
import sys
from collections.abc import Callable
from pathlib import Path

from coloebpf.errors import PkiError
from coloebpf.service.peer.pki import Identity, names_of

HANDSHAKE_S = 5.0
CHUNK = 1 << 18  # bytes that are read at a time
READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE


def encrypted(net: socket.socket, side: str, identity: Identity, name: str) -> ssl.SSLSocket:
    """After the handshake, not blocking. Raises OSError (ssl's are), PkiError."""
    net.settimeout(HANDSHAKE_S)
    net.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    server = side == "server"
    context = identity.server_context() if server else identity.client_context()
    tls = context.wrap_socket(
        net, server_side=server, server_hostname=None if server else name, suppress_ragged_eofs=False
    )
    if name not in names_of(tls.getpeercert()):
        raise PkiError(f"who has connected is not {name}")
    tls.settimeout(0)
    return tls


class _Way:
    """One direction: what `read` gives goes to `write`. Both raise ssl's wishes, BlockingIOError, or OSError."""

    def __init__(self, read: Callable[[], bytes], write: Callable[[memoryview], int]) -> None:
        self._read, self._write = read, write
        self._rest = memoryview(b"")

    def move(self) -> BaseException | None:
        """As far as it goes. Returns what it waits for, in the form of what was raised; None at its end."""
        try:
            while True:
                while self._rest:
                    self._rest = self._rest[self._write(self._rest) :]
                data = self._read()
                if not data:
                    return None
                self._rest = memoryview(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError, BlockingIOError) as e:
            return e

    @property
    def full(self) -> bool:
        """It waits for its sink, not for its source."""
        return bool(self._rest)


def carry(tls: ssl.SSLSocket, plain: socket.socket) -> None:
    """Returns at the end of either side, when what it had sent was passed on. Raises OSError."""
    plain.settimeout(0)
    out = _Way(lambda: plain.recv(CHUNK), tls.send)
    into = _Way(lambda: tls.recv(CHUNK), plain.send)
    with selectors.DefaultSelector() as selector:
        selector.register(tls, READ)
        selector.register(plain, READ)
        while True:
            of_tls = of_plain = 0
            for way in (out, into):
                waits = way.move()
                if waits is None:
                    return
                if isinstance(waits, ssl.SSLWantWriteError):
                    of_tls |= WRITE
                elif isinstance(waits, ssl.SSLWantReadError):
                    of_tls |= READ
                else:
                    of_plain |= WRITE if way.full else READ
            for end, events in ((tls, of_tls), (plain, of_plain)):
                _watch(selector, end, events)
            selector.select()


def _watch(selector: selectors.BaseSelector, end: socket.socket, events: int) -> None:
    if end in selector.get_map():
        selector.unregister(end)
    if events:
        selector.register(end, events)


def main(side: str, net: int, plain: int, identity: Identity, name: str) -> str:
    """What went wrong, "" for nothing."""
    with socket.socket(fileno=plain) as near, socket.socket(fileno=net) as far:
        try:
            with encrypted(far, side, identity, name) as tls:
                try:
                    carry(tls, near)
                finally:
                    with contextlib.suppress(OSError):
                        tls.settimeout(HANDSHAKE_S)
                        tls.unwrap()
        except (OSError, PkiError) as e:
            return f"the copy's connection to {name}: {e}"
    return ""


if __name__ == "__main__":
    words = sys.argv[1:]
    if os.fork():
        os._exit(0)  # whoever started it has no child to look after
    os.setsid()
    sys.exit(main(words[0], int(words[1]), int(words[2]), Identity(*map(Path, words[3:6])), words[6]) or None)
