"""One connection's framing: numbered messages in, numbered messages out, nothing without a bound.

A message is handed on in the same turn of the event loop in which its last byte came: no task, no queue. From a
divergence to the request for a checkpoint two of them have to go from host to host (asking.py), in less than 1 ms.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import NoReturn

from coloebpf.errors import MessageError
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import Hello, Message

UNSENT_MAX = 4 * messages.MAX_BYTES  # bytes that wait for a peer that does not read; it is as good as gone then
UNREAD_MAX = 2 * messages.MAX_BYTES  # bytes taken from the socket before somebody wants them
END_TIMEOUT = 0.5  # seconds for the last bytes to leave


class Session(asyncio.Protocol):
    """A TLS connection, from its handshake on. `source`: the other side's address; `hello`: its own, once it came."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.hello: Hello | None = None
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._unread = bytearray()
        self._sent = self._received = 0
        self._heard = self._loop.time()  # the last whole message
        self._take: Callable[[Message], None] | None = None
        self._failure: Exception | None = None  # why nothing comes any more
        self._news = asyncio.Event()  # more bytes, or the end of them
        self._lost = asyncio.Event()

    # ---- for the link ----------------------------------------------------------------------------------------------

    @property
    def transport(self) -> asyncio.Transport:
        """There is one from the end of the handshake on."""
        assert self._transport is not None
        return self._transport

    def send(self, message: Message) -> bool:
        """Sends; False, and the session is over, if too much waits already."""
        if self._failure is not None or self.transport.is_closing():
            return False
        if self.transport.get_write_buffer_size() > UNSENT_MAX:
            self.abort()
            return False
        self._sent += 1
        self.transport.write(messages.encode(message, self._sent))
        return True

    async def receive(self) -> Message:
        """The first message. Raises what run() raises."""
        while (message := self._next()) is None:
            if self._failure is not None:
                raise self._failure
            self._news.clear()
            await self._news.wait()
        return message

    async def run(self, take: Callable[[Message], None], idle_s: float) -> NoReturn:
        """Hands on each message that comes, until there are no more.

        Raises MessageError for what is none, IncompleteReadError at the end, TimeoutError if none comes for `idle_s`
        seconds, OSError.
        """
        self._take = take
        self._hand_on()
        self.transport.resume_reading()
        while self._failure is None:
            left_s = self._heard + idle_s - self._loop.time()
            if left_s <= 0:
                raise TimeoutError
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._news.wait()
        raise self._failure

    async def end(self) -> None:
        """Closes after what was sent has left, or soon."""
        self.transport.close()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(END_TIMEOUT):
                await self._lost.wait()
        self.abort()

    def abort(self) -> None:
        """Closes at once; nothing more is handed on."""
        self._fail(ConnectionAbortedError("closed here"))
        self.transport.abort()

    # ---- for the event loop ----------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # a beat that waits for an ACK is late

    def data_received(self, data: bytes) -> None:
        self._unread += data
        if self._take is not None:
            self._hand_on()
            return
        if len(self._unread) > UNREAD_MAX:
            self.transport.pause_reading()
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail(exc or asyncio.IncompleteReadError(bytes(self._unread[: messages.HEADER_BYTES]), None))
        self._lost.set()

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _hand_on(self) -> None:
        try:
            while self._failure is None and (message := self._next()) is not None:
                assert self._take is not None
                self._take(message)
        except MessageError as e:
            self._fail(e)

    def _next(self) -> Message | None:
        """The next message, if all of it has come. Raises MessageError for what is none."""
        if len(self._unread) < messages.HEADER_BYTES:
            return None
        end = messages.HEADER_BYTES + messages.body_bytes(bytes(self._unread[: messages.HEADER_BYTES]))
        if len(self._unread) < end:
            return None
        body = bytes(self._unread[messages.HEADER_BYTES : end])
        del self._unread[:end]
        self._received += 1
        message = messages.decode(body, self._received)
        self._heard = self._loop.time()
        return message

    def _fail(self, why: Exception) -> None:
        """The first reason is the one that counts."""
        if self._failure is None:
            self._failure = why
        self._news.set()
