"""One connection of libxl: what it says, what it is told, how it ends. libxl_colo.py decides what that means."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Protocol

from coloebpf.errors import WireError
from coloebpf.service.engines import libxl_wire as wire

HANDSHAKE_S = 1.0  # from connect to INIT; libxl sends it at once and waits 0.5 s for the answer
MESSAGE_S = 1.0  # from a message's first byte to its last; libxl sends both parts at once
MAX_READS = 64  # in one go; then the loop's other work has its turn


class Host(Protocol):
    """What a session tells its engine, on the event loop."""

    def initialized(self, session: Session, again: bool) -> None:
        """INIT has come and was answered."""

    def checkpointed(self, session: Session, since_ns: int) -> None:
        """COLO_CHECKPOINT has come; `since_ns`: when its header arrived here, CLOCK_MONOTONIC ns, 0 if unknown."""

    def ended(self, session: Session, why: str, fault: bool) -> None:
        """The connection is closed; `fault`: by us, since the other end did not keep to the protocol."""


class Session:
    """Takes bytes from the event loop without a task: from a message's arrival to the engine it is one call.

    `adopted`: INIT was answered by a process before this one.
    """

    def __init__(self, host: Host, connection: socket.socket, adopted: bool = False) -> None:
        self.connection = connection
        self.init_seen = adopted
        self._host = host
        self._reader = wire.Reader(adopted)
        self._began_ns = 0  # when the present message's first bytes arrived
        self._timer: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._open = True
        self._loop.add_reader(connection.fileno(), self._readable)
        if not adopted:
            self._arm(HANDSHAKE_S, f"no INIT within {HANDSHAKE_S} s")

    def request(self) -> None:
        """DO_CHECKPOINT."""
        self._send(wire.DO_CHECKPOINT)

    def let_go(self) -> None:
        """Closes our end without a word to the engine. While systemd holds a duplicate libxl does not notice."""
        if self._open:
            self._open = False
            self._disarm()
            self._loop.remove_reader(self.connection.fileno())
            self.connection.close()

    def _readable(self) -> None:
        try:
            for _ in range(MAX_READS):
                if not self._open:
                    return
                # What has come is read before it is acknowledged: the ACK lets more come, and pieces that wait
                # together have but the last one's time.
                piece, arrived_ns = wire.read(self.connection, self._reader.wanted)
                wire.hurry(self.connection)
                if not piece:
                    self._end("end of file")
                    return
                if not self._reader.in_message:
                    self._began_ns = arrived_ns
                self._take(piece)
        except BlockingIOError:
            return
        except WireError as e:
            self._end(str(e), fault=True)
        except OSError as e:
            self._end(f"connection broke: {e.strerror}")

    def _take(self, piece: bytes) -> None:
        body = self._reader.feed(piece)
        if body is None:
            if self._timer is None:
                self._arm(MESSAGE_S, f"a message that is not whole after {MESSAGE_S} s")
            return
        if body == wire.INIT:
            self._disarm()
            self._send(wire.INIT_ANSWER)
            again, self.init_seen = self.init_seen, True
            self._host.initialized(self, again)
        elif not self.init_seen:
            raise WireError("COLO_CHECKPOINT before INIT")
        else:
            self._disarm()
            self._host.checkpointed(self, self._began_ns)

    def _send(self, body: bytes) -> None:
        """At most one message waits on libxl's side, so the kernel's buffer has room, or nothing works any more."""
        if not self._open:
            return
        message = wire.frame(body)
        try:
            sent = self.connection.send(message)
            wire.hurry(self.connection)
        except OSError as e:
            # Told by the next read, so that the engine hears of it outside its own call.
            self._loop.call_soon(self._end, f"connection broke: {e.strerror}")
            return
        if sent != len(message):
            self._loop.call_soon(self._end, "the kernel took a part of a message only", True)

    def _end(self, why: str, fault: bool = False) -> None:
        if self._open:
            self.let_go()
            self._host.ended(self, why, fault)

    def _arm(self, seconds: float, why: str) -> None:
        self._timer = self._loop.call_later(seconds, self._end, why, True)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


class Refusal:
    """A connection that nobody wants, kept open without an answer until libxl gives up.

    libxl takes EOF for an answer to INIT, goes on, and then checkpoints without pause; silence fails its start.
    """

    def __init__(self, connection: socket.socket, done: Callable[[Refusal], None]) -> None:
        self._connection = connection
        self._done = done
        self._timer = asyncio.get_running_loop().call_later(HANDSHAKE_S, self.close)

    def close(self) -> None:
        self._timer.cancel()
        self._connection.close()
        self._done(self)
