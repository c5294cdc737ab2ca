"""One connection's framing: numbered messages in, numbered messages out, nothing without a bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import Hello, Message

UNSENT_MAX = 4 * messages.MAX_BYTES  # bytes that wait for a peer that does not read; it is as good as gone then
END_TIMEOUT = 0.5  # seconds for the last bytes to leave


class Session:
    """A TLS connection whose certificates were checked. `hello` is the other side's, once it has come."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, source: str) -> None:
        self.source = source
        self.hello: Hello | None = None
        self._reader, self._writer = reader, writer
        self._sent = self._received = 0
        connection = writer.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a beat that waits for an ACK is late

    def send(self, message: Message) -> bool:
        """Queues it; False, and the session is over, if too much waits already."""
        transport = self._writer.transport
        if transport.is_closing():
            return False
        if transport.get_write_buffer_size() > UNSENT_MAX:
            self.abort()
            return False
        self._sent += 1
        self._writer.write(messages.encode(message, self._sent))
        return True

    async def receive(self) -> Message:
        """The next message. Raises MessageError for anything else, IncompleteReadError at the end, OSError."""
        header = await self._reader.readexactly(messages.HEADER_BYTES)
        body = await self._reader.readexactly(messages.body_bytes(header))
        self._received += 1
        return messages.decode(body, self._received)

    async def end(self) -> None:
        """Closes after what was sent has left, or soon."""
        self._writer.close()
        with contextlib.suppress(TimeoutError, OSError, ssl.SSLError):
            async with asyncio.timeout(END_TIMEOUT):
                await self._writer.wait_closed()
        self.abort()

    def abort(self) -> None:
        """Closes at once."""
        self._writer.transport.abort()
