"""Copies of memory that go to the other host through TLS: a process for each connection (coloebpf/tunnel.py)."""

from __future__ import annotations

import asyncio
import socket
import sys
from dataclasses import dataclass

from coloebpf.errors import EngineError
from coloebpf.service.config import PeerConfig
from coloebpf.service.peer.pki import Identity

RUNE = (sys.executable, "-m", "coloebpf.tunnel")


@dataclass(frozen=True)
class Encryption:
    """With the certificates of the services' own link. `name`: the other host's."""

    identity: Identity
    name: str

    @classmethod
    def of(cls, peer: PeerConfig) -> Encryption | None:
        """None if copies go as they are."""
        return cls(Identity(peer.ca, peer.certificate, peer.key), peer.name) if peer.encrypt_copies else None

    async def around(self, connection: socket.socket, server: bool) -> socket.socket:
        """What goes in and comes out behind TLS, not blocking; `connection` is the process's from here on.

        The process does not end with this one. Raises EngineError if it can't be started; what goes wrong later ends
        the connection, and is told on the standard error output.
        """
        near, far = socket.socketpair()
        ends = (connection.fileno(), far.fileno())
        who = self.identity
        words = ("server" if server else "client", *map(str, ends), who.ca, who.certificate, who.key, self.name)
        try:
            starter = await asyncio.create_subprocess_exec(
                *RUNE, *words, pass_fds=ends, stdin=asyncio.subprocess.DEVNULL
            )
            code = await starter.wait()
        except BaseException as e:
            near.close()
            if isinstance(e, OSError):
                raise EngineError(f"{RUNE[0]} can't be run: {e.strerror}") from e
            raise
        finally:
            connection.close()
            far.close()
        if code:
            near.close()
            raise EngineError(f"{' '.join(RUNE)} has ended with {code}")
        near.setblocking(False)
        return near
