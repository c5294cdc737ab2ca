"""Engine libxl-colo: what libxl's COLO connects to on the primary (`xl remus -c -p`).

libxl decides and tells little: it checkpoints when asked, or by itself after 5 s, and says so once the secondary has
the whole state and the PVM is about to go on. So Suspended and Committed come together. After EOF it never connects
again and checkpoints without pause: the connection must outlive the service, so systemd gets a duplicate as soon as
it is accepted. The source: libxl_colo_proxy.c and libxl_colo_save.c of Xen 4.17 (shared/reference/xen-libxl-colo.md).
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable

from coloebpf.errors import EngineError
from coloebpf.model import Role
from coloebpf.service.engine import Committed, DomainGone, Emit, EngineEvent, Failed, Ready, SecondaryGone, Suspended
from coloebpf.service.engines import libxl_wire as wire
from coloebpf.service.engines.libxl_session import Refusal, Session
from coloebpf.service.fdstore import Notifier, checked_name
from coloebpf.service.log import say

LATE_NS = 2_000_000  # docs/libxl-colo.md: libxl talks to QEMU twice before it resumes the PVM
MAX_REFUSED = 8  # connections that are kept waiting at a time; more are closed at once

logger = logging.getLogger("coloebpf.libxl_colo")


def kept_name(pair: str) -> str:
    """The name under which systemd keeps a pair's connection. Raises ConfigError for a pair that can't have one."""
    return checked_name(f"libxl-colo.{pair}")


class LibxlColoEngine:
    """One guest's port. `listen`: a loopback address and a port (0: any).

    `domain_alive`: whether the guest exists on this host; it raises EngineError if nobody can say.
    On the secondary there is nothing to talk to: libxl runs the SVM, and makes it the guest when its channel breaks.
    """

    name = "libxl-colo"
    signals_suspended = False
    copies = True
    hands_over = (
        "libxl would go on copying the primary's guest over the other one: end the guest here (xl destroy), then the "
        "secondary takes over"
    )

    def __init__(
        self,
        pair: str,
        role: Role,
        listen: tuple[str, int],
        emit: Emit,
        domain_alive: Callable[[], Awaitable[bool]],
        notifier: Notifier,
        late_ns: int = LATE_NS,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        wire.check_loopback(listen[0])
        self.pair, self.role = pair, role
        self._listen = listen
        self._kept_name = kept_name(pair)
        self._emit_to = emit
        self._domain_alive = domain_alive
        self._notifier = notifier
        self._late_ns, self._clock = late_ns, clock
        self._listener: socket.socket | None = None
        self._session: Session | None = None
        self._refusals: set[Refusal] = set()
        self._on_its_way = False  # a checkpoint that libxl will tell of: asked for, or the first one after INIT
        self._requested = False  # it was asked for
        self._given_up = False
        self._inquiry: asyncio.Task[None] | None = None
        self._stopped = False

    @property
    def port(self) -> int:
        """The port it listens on. Raises EngineError before start()."""
        if self._listener is None:
            raise EngineError(f"pair {self.pair}: the engine does not listen")
        return int(self._listener.getsockname()[1])

    # ---- coloebpf.service.engine.Engine ----------------------------------------------------------------------------

    async def start(self) -> None:
        """Listens; Ready follows when libxl has connected. Raises EngineError if the port can't be had."""
        if self.role is Role.SECONDARY:
            self._emit(Ready())
            return
        try:
            self._listener = socket.create_server(self._listen)
        except OSError as e:
            raise EngineError(f"pair {self.pair}: can't listen on {self._listen}: {e.strerror}") from e
        wire.prepare(self._listener)
        asyncio.get_running_loop().add_reader(self._listener.fileno(), self._accept)
        self._say(logging.INFO, "waiting for libxl", port=self.port)

    def adopt(self, connection: socket.socket, outstanding: bool) -> None:
        """Before start(): goes on with a connection that an earlier process accepted. Ready follows at once.

        `outstanding`: a request may have been sent to which no COLO_CHECKPOINT has come. True when in doubt: then
        nothing is sent until libxl tells of a checkpoint, which it does after some 5 s at the latest, asked or not. A
        wrong False could queue a second request, and that would be a second checkpoint. The pair's state in the
        dataplane tells it, if that is written before request_checkpoint() and after Committed.
        A COLO_CHECKPOINT that the earlier process has read and not handled is lost; the next one commits for both.
        Raises EngineError for what is no TCP connection.
        """
        try:
            wire.prepare(connection)
        except OSError as e:
            raise EngineError(f"pair {self.pair}: what was kept is no connection of libxl: {e.strerror}") from e
        self._on_its_way = self._requested = outstanding
        self._session = Session(self, connection, adopted=True)
        self._say(logging.INFO, "went on with libxl's connection", outstanding=outstanding)
        self._emit(Ready())

    async def request_checkpoint(self) -> None:
        """Asks, unless one is on its way already. Raises EngineError while no libxl is connected."""
        if self._session is None or not self._session.init_seen or self._given_up:
            raise EngineError(f"pair {self.pair}: no libxl is connected; is `xl remus -c -p` running?")
        if not self._on_its_way:
            self._on_its_way = self._requested = True
            self._session.request()

    async def failover(self) -> None:
        """libxl has no message for it. Secondary: nothing to do, the SVM runs. Primary: tells no more of this session.

        The connection stays open: libxl resumes the PVM and ends by itself when its channel to the secondary breaks.
        """
        self._given_up = True
        self._say(logging.WARNING, "gave up the secondary; `xl remus` ends when its channel to the secondary breaks")

    async def guest_lives(self) -> bool:
        """See Inquiring. Without a connection that was kept, libxl has seen EOF and never comes back."""
        return await self._domain_alive()

    async def stop(self) -> None:
        """Lets go of port and connection. In systemd's store the connection stays open, and libxl notices nothing."""
        self._stopped = True
        if self._inquiry is not None:
            self._inquiry.cancel()
            await asyncio.gather(self._inquiry, return_exceptions=True)
        for refusal in tuple(self._refusals):
            refusal.close()
        if self._session is not None:
            self._session.let_go()
            self._session = None
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener.fileno())
            self._listener.close()
            self._listener = None

    # ---- what a session tells (libxl_session.Host) -----------------------------------------------------------------

    def initialized(self, session: Session, again: bool) -> None:
        # libxl makes the first checkpoint by itself, and a request before it would be one more.
        self._on_its_way, self._requested, self._given_up = True, False, False
        if again:
            self._say(logging.WARNING, "libxl sent INIT again")
        else:
            self._say(logging.INFO, "libxl is connected")
            self._emit(Ready())

    def checkpointed(self, session: Session, since_ns: int) -> None:
        requested = self._requested
        self._on_its_way = self._requested = False
        if self._given_up:
            return
        self._emit(Suspended(requested=requested))
        age_ns = self._clock() - since_ns
        if 0 <= age_ns <= self._late_ns:
            self._emit(Committed())
        else:
            age = f"for {age_ns / 1e6:.1f} ms" if since_ns else "for an unknown time"
            self._emit(Failed(f"libxl's COLO_CHECKPOINT has waited here {age}: the PVM may have sent more since"))

    def ended(self, session: Session, why: str, fault: bool) -> None:
        self._session = None
        self._notifier.drop(self._kept_name)
        if not session.init_seen:
            self._say(logging.WARNING, "a connection ended before INIT", why=why)
            return
        self._say(logging.WARNING, "libxl's connection has ended", why=why)
        if self._given_up:
            return
        if fault:
            self._emit(Failed(f"libxl did not keep to its protocol: {why}", fatal=True))
        else:
            self._inquiry = asyncio.get_running_loop().create_task(self._inquire(why))

    # ---- inside ----------------------------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, (host, port) = self._listener.accept()
        except OSError as e:  # it has left meanwhile, or this process has no descriptor to spare
            self._say(logging.WARNING, "could not accept a connection", why=e.strerror)
            return
        peer = f"{host}:{port}"
        user = wire.owner(connection)
        if not wire.trusted(user):
            self._say(logging.WARNING, "refused a connection that is not root's", peer=peer, user=user)
            connection.close()
        elif self._session is not None:
            self._say(logging.WARNING, "refused a second connection", peer=peer)
            if len(self._refusals) < MAX_REFUSED:
                self._refusals.add(Refusal(connection, self._refusals.discard))
            else:
                connection.close()
        else:
            self._keep(connection)
            wire.prepare(connection)
            self._session = Session(self, connection)
            self._say(logging.INFO, "accepted a connection", peer=peer)

    def _keep(self, connection: socket.socket) -> None:
        self._notifier.drop(self._kept_name)  # of an earlier session that was let go
        if not self._notifier.keep(self._kept_name, connection.fileno()):
            self._say(
                logging.WARNING, "nobody keeps libxl's connection: when the service ends, it checkpoints without pause"
            )

    async def _inquire(self, why: str) -> None:
        """libxl has no word for why it leaves: if the guest is still there, it was the secondary that failed."""
        try:
            alive = await self._domain_alive()
        except EngineError as e:
            self._emit(Failed(f"libxl has left ({why}), and nobody can say whether the guest lives: {e}", fatal=True))
            return
        if alive:
            self._emit(SecondaryGone(f"libxl has left ({why}), the guest lives"))
        else:
            self._emit(DomainGone(f"libxl has left ({why}), and the guest is gone"))

    def _emit(self, event: EngineEvent) -> None:
        if not self._stopped:
            self._emit_to(event)

    def _say(self, level: int, sentence: str, **fields: object) -> None:
        say(logger, level, sentence, pair=self.pair, **fields)
