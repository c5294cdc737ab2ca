"""The connection of the two hosts' services: TLS 1.3, both sides with certificates, one session at a time.

The host with the smaller name connects, the other one listens, so there are no two connections to choose between. The
connecting side has one connection at a time and opens the next one only when the last is over. A new session therefore
replaces the old one on the listening side, which may not have heard of its end; only a connection that was begun before
the present one (a late arrival: Hello.connection counts) is turned away. After on_down nothing of that session arrives.

Whatever may not come in is refused, counted in `refused`, and logged once a minute and kind.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import ssl
from collections.abc import Callable, Sequence
from typing import TypeVar

from coloebpf.errors import LinkError, MessageError
from coloebpf.service.log import say
from coloebpf.service.peer import messages
from coloebpf.service.peer.messages import Hello, Message, PairNote
from coloebpf.service.peer.pki import Identity, check_name, names_of
from coloebpf.service.peer.refusals import Refusals, kind_of
from coloebpf.service.peer.session import Session
from coloebpf.service.tasks import Tasks

log = logging.getLogger(__name__)
T = TypeVar("T")

OPEN_TIMEOUT = 2.0  # seconds for TCP and TLS together; a LAN takes milliseconds
HELLO_TIMEOUT = 2.0  # seconds from TLS to the other side's hello
IDLE_MIN = 2.0  # seconds without a message that end a session at the earliest
IDLE_BEATS = 40  # heartbeats that have to be missing: far beyond the time after which the other side counts as lost
HALF_OPEN = 8  # connections without a hello, for the peer's address and for all others together
BACKLOG = 16  # connections the kernel may keep for us
RETRY_FIRST, RETRY_LAST = 0.05, 1.0  # seconds between tries to connect: short, for every one costs protection
HELD_LONG = 1.0  # seconds: a session that lasted so long was a good one, the next try comes at once


class PeerLink:
    """The link of this host to one other.

    `pairs` gives what a hello says of this host's pairs; `session` is this service's cookie, random, of SESSION_BYTES.
    The callbacks run on the event loop and must not block: on_up(hello of the other side), on_message(message),
    on_down(reason). `listen` and `connect` are (address, port).
    """

    def __init__(
        self,
        name: str,
        peer: str,
        identity: Identity,
        *,
        listen: tuple[str, int],
        connect: tuple[str, int],
        session: bytes,
        interval_s: float,
        lease_ns: int,
        pairs: Callable[[], Sequence[PairNote]],
        on_message: Callable[[Message], None],
        on_up: Callable[[Hello], None],
        on_down: Callable[[str], None],
    ) -> None:
        if name == peer:
            raise LinkError(f"both hosts are called {name}: [host] name and [peer] name must differ")
        check_name(peer)
        self.name, self.peer, self.identity = name, peer, identity
        self.refused = Refusals(log)
        self.sent = dict.fromkeys(messages.TYPES, 0)
        self.received = dict.fromkeys(messages.TYPES, 0)
        self.sessions = 0  # that have been up
        self._listen, self._connect = listen, connect
        self._cookie, self._lease_ns, self._pairs = session.hex(), lease_ns, pairs
        self._idle = max(IDLE_MIN, IDLE_BEATS * interval_s)
        self._on_message, self._on_up, self._on_down = on_message, on_up, on_down
        self._session: Session | None = None
        self._tries = 0
        self._half_open = {True: 0, False: 0}  # from the peer's address or not -> how many
        self._tasks = Tasks(lambda error: log.error("a task of the link failed", exc_info=error))
        self._socket: socket.socket | None = None
        self._context = self._new_context()

    # ---- for the owner ---------------------------------------------------------------------------------------------

    @property
    def connects(self) -> bool:
        """This host opens the connection."""
        return opens(self.name, self.peer)

    @property
    def connected(self) -> bool:
        return self._session is not None

    @property
    def port(self) -> int:
        """That this host listens on; 0 if it doesn't."""
        return int(self._socket.getsockname()[1]) if self._socket else 0

    def start(self) -> None:
        """Begins to listen or to connect, on the running loop. Raises LinkError if the address can't be listened on."""
        if self.connects:
            self._tasks.spawn(self._connect_forever())
            return
        family = socket.AF_INET6 if ":" in self._listen[0] else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(self._listen)
            listening.listen(BACKLOG)
        except OSError as e:
            listening.close()
            raise LinkError(f"can't listen on {self._listen[0]}:{self._listen[1]}: {e.strerror}") from e
        listening.setblocking(False)
        self._socket = listening
        self._tasks.spawn(self._accept_forever(listening))

    def send(self, message: Message) -> bool:
        """Sends, in order; False if there is no session, or this one has just ended because nobody reads there."""
        if self._session is None or not self._session.send(message):
            return False
        self.sent[message.TYPE] += 1
        return True

    def reload_certificates(self) -> None:
        """Takes the files anew, for connections from here on. Raises PkiError, and keeps the old ones."""
        self._context = self._new_context()

    def begin_anew(self, reason: str) -> None:
        """Ends the session; the next one begins with hellos of what is served now."""
        self._drop(reason)

    async def stop(self, reason: str) -> None:
        """Says bye, ends everything. on_down is not called any more."""
        session, self._session = self._session, None
        if session is not None:
            session.send(messages.Bye(reason[: messages.MAX_REASON]))
            await session.end()
        if self._socket is not None:
            self._socket.close()
        await self._tasks.end()

    # ---- connections -----------------------------------------------------------------------------------------------

    def _new_context(self) -> ssl.SSLContext:
        return self.identity.client_context() if self.connects else self.identity.server_context()

    async def _accept_forever(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, source = await loop.sock_accept(listening)
            except OSError as e:  # such as no file descriptor left: what is there goes on
                self.refused.note("surplus", "none", f"accept: {e.strerror}")
                await asyncio.sleep(RETRY_LAST)
                continue
            known = source[0] == self._connect[0]
            if self._half_open[known] >= HALF_OPEN:
                connection.close()
                self.refused.note("surplus", source[0], f"{HALF_OPEN} connections have not said hello yet")
                continue
            self._half_open[known] += 1
            self._tasks.spawn(self._serve(connection, source[0], known))

    async def _serve(self, connection: socket.socket, source: str, known: bool) -> None:
        try:
            session = await self._opened(source, sock=connection)
        finally:
            self._half_open[known] -= 1
        if session is not None:
            await self._live(session)

    async def _connect_forever(self) -> None:
        loop, pause = asyncio.get_running_loop(), RETRY_FIRST
        while True:
            began = loop.time()
            self._tries += 1
            session = await self._opened(self._connect[0], address=self._connect)
            if session is not None:
                await self._live(session)
            pause = RETRY_FIRST if session and loop.time() - began > HELD_LONG else min(2 * pause, RETRY_LAST)
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # so that nothing falls into step with it

    async def _opened(
        self, source: str, *, sock: socket.socket | None = None, address: tuple[str, int] | None = None
    ) -> Session | None:
        """A session that has passed TLS, the name and the hello; None if it was refused, or nobody is there."""
        session: Session | None = None
        try:
            async with asyncio.timeout(OPEN_TIMEOUT):
                session = await self._secured(source, sock, address)
            names = names_of(session.transport.get_extra_info("peercert"))
            if self.peer not in names:
                raise MessageError("name", f"certificate of {', '.join(names) or 'nobody'} instead of {self.peer}")
            session.send(Hello(self.name, self._cookie, self._tries, self._lease_ns, tuple(self._pairs())))
            async with asyncio.timeout(HELLO_TIMEOUT):
                session.hello = self._judged(await session.receive())
            return session
        except MessageError as e:
            self.refused.note(e.kind, source, str(e))
        except ssl.SSLError as e:
            self.refused.note(kind_of(e), source, str(e))
        except (OSError, asyncio.IncompleteReadError) as e:  # TimeoutError is an OSError
            if isinstance(e, TimeoutError) and (sock or session):
                self.refused.note("timeout", source, "no hello in time" if session else "no TLS in time")
            # Else nobody is there, or gone again: what a connecting side sees as long as the other host is down.
            say(log, logging.DEBUG, "no connection to the peer", peer=self.peer, address=source, error=e)
        if session is not None:
            session.abort()
        return None

    async def _secured(self, source: str, sock: socket.socket | None, address: tuple[str, int] | None) -> Session:
        loop, session = asyncio.get_running_loop(), Session(source)
        if address is not None:
            await loop.create_connection(lambda: session, *address, ssl=self._context, server_hostname=self.peer)
        else:
            assert sock is not None
            await loop.connect_accepted_socket(lambda: session, sock, ssl=self._context)
        return session

    def _judged(self, hello: Message) -> Hello:
        """Raises MessageError unless it is a hello that may become the session."""
        if not isinstance(hello, Hello):
            raise MessageError("malformed", f"{hello.TYPE} before hello")
        if hello.name != self.peer:
            raise MessageError("name", f"hello of {hello.name} instead of {self.peer}")
        present = self._session.hello if self._session else None
        if (
            not self.connects
            and present
            and present.session == hello.session
            and hello.connection <= present.connection
        ):
            raise MessageError("replay", f"connection {hello.connection} came after {present.connection}")
        return hello

    # ---- a session -------------------------------------------------------------------------------------------------

    async def _live(self, session: Session) -> None:
        """From on_up to on_down."""
        assert session.hello is not None
        self._drop("another connection of the peer took its place")
        self._session = session
        self.sessions += 1
        self.received["hello"] += 1
        say(log, logging.INFO, "link is up", peer=self.peer, address=session.source, session=session.hello.session[:8])
        self._tell(self._on_up, session.hello)
        reason = "cancelled"
        try:
            reason = await self._read(session)
        finally:
            session.abort()
            if self._session is session:
                self._drop(reason)

    async def _read(self, session: Session) -> str:
        """Hands on what comes until the session ends; returns why it did."""
        try:
            await session.run(self._arrived, self._idle)
        except MessageError as e:
            self.refused.note(e.kind, session.source, str(e))
            return str(e)
        except TimeoutError:
            self.refused.note("timeout", session.source, f"nothing for {self._idle:g} s")
            return f"nothing came for {self._idle:g} s"
        except asyncio.IncompleteReadError:
            return "the peer has closed it"
        except OSError as e:  # ssl.SSLError too, such as the alert of a server that refuses our certificate
            return str(e) or type(e).__name__

    def _arrived(self, message: Message) -> None:
        """Of the present session: one that another has replaced was aborted, and hands on nothing."""
        if isinstance(message, Hello):
            raise MessageError("malformed", "a second hello")
        self.received[message.TYPE] += 1
        self._tell(self._on_message, message)

    def _drop(self, reason: str) -> None:
        session, self._session = self._session, None
        if session is None:
            return
        session.abort()
        say(log, logging.WARNING, "link is down", peer=self.peer, reason=reason)
        self._tell(self._on_down, reason)

    @staticmethod
    def _tell(callback: Callable[[T], None], what: T) -> None:
        try:
            callback(what)
        except Exception:  # a mistake in handling one message must not cost the link
            log.exception("the service could not handle %r", what)


def opens(name: str, peer: str) -> bool:
    """Of the two hosts' names: the one that connects; the other one listens."""
    return name < peer
