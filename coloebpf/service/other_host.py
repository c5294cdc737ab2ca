"""The other host, as this one's service knows it: the link, the heartbeats, and who is told what comes by them."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from coloebpf.control import Control
from coloebpf.service.config import PeerConfig
from coloebpf.service.farewell import Farewell
from coloebpf.service.heartbeat import Heartbeat, Reports
from coloebpf.service.log import say
from coloebpf.service.paths import Watch
from coloebpf.service.peer.fields import SESSION_BYTES
from coloebpf.service.peer.link import PeerLink
from coloebpf.service.peer.messages import Beat, Bye, Hello, Message, Patience, Restarting, Settled
from coloebpf.service.peer.pki import Identity
from coloebpf.service.peer.witness import lease_of
from coloebpf.service.primary import Primary
from coloebpf.service.secondary import Secondary

log = logging.getLogger("coloebpf.service")

MS = 1_000_000  # ns
GRACE_NS = 3_000 * MS  # for the first hello: the other side tries to connect once a second, TLS included


class Served(Protocol):
    """The pairs that are served now, by number and in its order."""

    pairs: dict[int, Primary | Secondary]

    def all(self) -> Iterable[Primary | Secondary]: ...


class OtherHost:
    """Made when the dataplane is there. Its maker starts `link` and `heartbeat`; `expiries`: for the status.

    Raises PkiError or LinkError.
    """

    def __init__(self, host: str, peer: PeerConfig, served: Served, control: Control, clock: Callable[[], int]) -> None:
        self._host, self._served = host, served
        identity = Identity(peer.ca, peer.certificate, peer.key)
        self.expiries = identity.check(host, time.time())
        cookie, timeout_ns = secrets.token_bytes(SESSION_BYTES), peer.heartbeat_timeout_ms * MS
        interval_ns, lease_ns = peer.heartbeat_interval_ms * MS, lease_of(timeout_ns)
        self.link = PeerLink(
            host, peer.name, identity, listen=peer.listen, connect=peer.connect, session=cookie,
            interval_s=interval_ns / 1e9, lease_ns=lease_ns, pairs=lambda: [pair.note() for pair in served.all()],
            on_message=self._received, on_up=self._link_up, on_down=self._link_down,
        )  # fmt: skip
        self.heartbeat = Heartbeat(
            session=cookie, interval_ns=interval_ns, timeout_ns=timeout_ns, lease_ns=lease_ns, clock=clock,
            send=self.link.send, fwd_beats=control.fwd_beats, grace_ns=GRACE_NS,
            reports=Reports(
                lost=lambda number: served.pairs[number].peer_lost(),
                back=lambda number: served.pairs[number].peer_back(),
                lease=self._leave, expect=control.expect_beats,
            ),
        )  # fmt: skip
        self.restart_grace_s = peer.restart_grace_ms // 1000
        self.farewell = Farewell(self.heartbeat, self.link.send, peer.restart_grace_ms, clock)

    def watch(self) -> None:
        """Heartbeats for just the pairs that are served."""
        self.heartbeat.watch(
            Watch(
                pair=p.number, role=p.config.role, leased=p.out.arbiter.leased,
                fwds={nic.number: (nic.fwd, nic.vlan) for nic in p.config.nics},
            )
            for p in self._served.all()
        )  # fmt: skip

    def renew_certificates(self) -> None:
        """Takes the link's files anew, for connections from here on. Raises PkiError, and keeps the old ones."""
        self.expiries = self.link.identity.check(self._host, time.time())
        self.link.reload_certificates()

    # ---- what comes ------------------------------------------------------------------------------------------------

    def _leave(self, number: int, deadline_ns: int) -> None:
        pair = self._served.pairs[number]
        if isinstance(pair, Primary):
            pair.lease(deadline_ns)

    def _link_up(self, hello: Hello) -> None:
        self.heartbeat.peer_up(hello)
        notes = {note.number: note for note in hello.pairs}
        for pair in self._served.all():
            pair.link_up(notes.get(pair.number))

    def _link_down(self, _reason: str) -> None:
        for pair in self._served.all():
            pair.link_down()

    def _received(self, message: Message) -> None:
        match message:
            case Beat():
                self.heartbeat.received(message)
            case Restarting() | Patience() | Settled():
                self.farewell.received(message)
            case Bye():
                say(log, logging.WARNING, "the other host's service ends", reason=message.reason)
            case Hello():
                raise AssertionError("the link keeps hellos to itself")
            case _:
                pair = self._served.pairs.get(message.pair)
                if pair is not None:
                    pair.received(message)
