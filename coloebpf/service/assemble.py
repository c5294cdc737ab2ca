"""One host's service: every part of it, made out of the configuration and told of each other."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from coloebpf.aliases import Aliases
from coloebpf.control import Control
from coloebpf.errors import AnnounceError, ArbiterError, ColoError, EngineError, ServiceError
from coloebpf.model import Role, Sizes
from coloebpf.service import arbiters
from coloebpf.service.announce import AddressBook, announce
from coloebpf.service.arbiters.base import Arbiter
from coloebpf.service.comparer import Comparer, Walk
from coloebpf.service.config import Config, NicConfig, PairConfig
from coloebpf.service.control_socket import ControlSocket
from coloebpf.service.engines import making
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.fdstore import Kept, Notifier
from coloebpf.service.feed import Feed
from coloebpf.service.hooks import Hooks
from coloebpf.service.log import say
from coloebpf.service.machine import Change
from coloebpf.service.metrics_server import MetricsServer, Page
from coloebpf.service.orders import Orders
from coloebpf.service.other_host import OtherHost
from coloebpf.service.outside import Outside
from coloebpf.service.peer.link import PeerLink
from coloebpf.service.primary import Primary
from coloebpf.service.records import MapReader
from coloebpf.service.report import Reporter
from coloebpf.service.secondary import Secondary
from coloebpf.service.tasks import Tasks
from coloebpf.vifs import Vifs
from coloebpf.xen.watcher import Watcher

log = logging.getLogger("coloebpf.service")

LOOKS = 4  # walks in a compare_timeout, and signs of life in a service_loss_after
SIGN_S = 0.5  # seconds between two signs of life at most


class Service:
    """From start() to stop(). `ended` gets the exception of a part that must not end. `troubles`: for the status."""

    def __init__(
        self,
        config: Config,
        notifier: Notifier,
        kept: Sequence[Kept] = (),
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.config, self.notifier, self.clock = config, notifier, clock
        self.hooks = Hooks(config.host.pins, Sizes.of_mtu(config.host.mtu))
        self.pairs: dict[int, Primary | Secondary] = {}
        self.other: OtherHost | None = None
        self.troubles: dict[str, str] = {}
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._kept = making.KeptConnections(kept, notifier)
        self._watcher = Watcher()
        self._arbiters: dict[str, Arbiter] = {}
        self._reporter = Reporter(self, clock)
        self._socket = ControlSocket(config.host.control_socket, self._reporter, Orders(self.all))
        self._metrics: MetricsServer | None = None
        self._feed: Feed | None = None
        self._book: AddressBook | None = None
        self._tasks = Tasks(lambda error: log.error("a task of the service failed", exc_info=error))

    # ---- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Serves. A dataplane that runs already is worked at once, and loaded anew meanwhile. Raises a ColoError."""
        await self._socket.start()  # first, for it finds out whether there is another service
        running = self.hooks.running
        if running:
            self.hooks.open()
        else:
            await self._load(self.config.pairs)
            self.hooks.open()
        if self.config.peer is not None:
            self.other = OtherHost(self.config.host.name, self.config.peer, self, self.control, self.clock)
        self._book = AddressBook(self.control)
        reader = MapReader(self.control)
        comparer, walk = Comparer(reader, self.clock, self._name_of), Walk(self.control, reader, self.clock)
        self._feed = Feed(self.control, comparer, walk, self._book, self)
        for pair in self.config.pairs:
            await self.add(pair)
        self._kept.close()
        self.hooks.set_timeouts(self.config.pairs)
        self.watch()
        self._feed.start()
        if self.other is not None:
            self.other.link.start()
            self._must_run(self.other.heartbeat.run())
        self._must_run(self._feed.look())
        self._must_run(self._feed.walk(self._walk_period_s))
        self._must_run(self._show_life())
        if (listen := self.config.host.metrics_listen) is not None:
            page = Page(self._reporter.status, self._reporter.snapshot, time.monotonic)
            self._metrics = MetricsServer(page, listen.host, listen.port)
            await self._metrics.start()
        if running:
            self._tasks.spawn(self._load_again())

    async def stop(self, reason: str, again: bool = True) -> None:
        """Lets go of everything; the dataplane goes on as it is.

        `again`: the next service comes soon, so the other host is asked to wait for it.
        """
        if again and self.other is not None:
            grace_s = self.other.restart_grace_s
            await asyncio.gather(self.other.farewell.say(), *(pair.rest(grace_s) for pair in self.all()))
        await self._socket.stop()
        if self._metrics is not None:
            await self._metrics.stop()
        await self._tasks.end()
        if self._feed is not None:
            self._feed.stop()
        for pair in self.all():
            await pair.stop()
        if self.other is not None:
            await self.other.link.stop(reason)
        for arbiter in self._arbiters.values():
            await arbiter.close()
        self.hooks.close()

    # ---- what others look at -----------------------------------------------------------------------------------------

    @property
    def control(self) -> Control:
        return self.hooks.control

    @property
    def link(self) -> PeerLink | None:
        return self.other.link if self.other is not None else None

    def all(self) -> Iterable[Primary | Secondary]:
        """The pairs, by number."""
        return [self.pairs[number] for number in sorted(self.pairs)]

    def of_nic(self, nic: int) -> Primary | Secondary | None:
        """The pair that a NIC is of."""
        return next((p for p in self.pairs.values() if any(n.number == nic for n in p.config.nics)), None)

    def _name_of(self, nic: int) -> str | None:
        pair = self.of_nic(nic)
        return pair.config.name if pair is not None else None

    def findings(self, pair: int) -> Mapping[str, int]:
        """What the comparer has found of a pair."""
        return self._feed.findings.get(pair, {}) if self._feed else {}

    # ---- pairs -------------------------------------------------------------------------------------------------------

    async def add(self, config: PairConfig) -> None:
        """Serves a pair whose NICs are attached. Raises ColoError."""
        other = self.other
        assert other is not None, "pairs need a peer: config_checks"
        arbiter = await self._arbiter(config.arbiter)
        aliases = Aliases(self.control, config.number, tuple(nic.number for nic in config.nics))
        outside = Outside(
            self.control, other.link.send, other.heartbeat, arbiter, self.clock, self._announce, aliases,
        )  # fmt: skip
        kind = Primary if config.role is Role.PRIMARY else Secondary
        assert self.config.peer is not None
        engine = partial(
            making.make, config, self.notifier, self.control, self._watcher, other.link.send,
            encryption=Encryption.of(self.config.peer),
        )  # fmt: skip
        pair = kind(config, engine, outside)
        self.hooks.exempt(config)
        pair.machine.listeners.append(self._changed)
        self._kept.hand_over(config, pair.engine, self.control.state(config.number))
        try:
            await pair.start()
        except EngineError as e:
            await pair.stop()
            raise ServiceError(f"pair {config.name} can't be served: {e}") from e
        self.pairs[config.number] = pair

    async def drop(self, number: int) -> None:
        """Serves it no more."""
        await self.pairs.pop(number).stop()

    def watch(self) -> None:
        """Heartbeats for just the pairs that are served."""
        if self.other is not None:
            self.other.watch()

    def renew_certificates(self) -> None:
        """See OtherHost. Raises PkiError."""
        if self.other is not None:
            self.other.renew_certificates()

    def _changed(self, change: Change) -> None:
        if change.new is not change.old:
            self.notifier.status(", ".join(f"{p.config.name}: {p.machine.state.name.lower()}" for p in self.all()))

    async def _arbiter(self, kind: str) -> Arbiter:
        if kind not in self._arbiters:
            self._arbiters[kind] = arbiters.make(kind, self.config.arbiter, self.config.host.name, self.clock)
            try:
                await self._arbiters[kind].check()
            except ArbiterError as e:
                say(log, logging.WARNING, "the arbiter would not answer now", arbiter=kind, error=e)
        return self._arbiters[kind]

    def _announce(self, pair: PairConfig) -> None:
        for nic in pair.nics:
            self._tasks.spawn(self._announce_nic(pair, nic))

    async def _announce_nic(self, pair: PairConfig, nic: NicConfig) -> None:
        assert self._book is not None
        try:
            vif = socket.if_indextoname(Vifs(self.control, pair.number, (nic.number,)).here(nic.number))
            await announce(vif, nic.mac, partial(self._book.addresses, nic.number))
        except (AnnounceError, OSError) as e:
            say(log, logging.ERROR, "the guest's new place is not announced", pair=pair.name, nic=nic.number, error=e)

    # ---- tasks -------------------------------------------------------------------------------------------------------

    async def _load(self, pairs: Sequence[PairConfig]) -> None:
        await self.hooks.load()
        for pair in pairs:
            await self.hooks.attach(pair)
        self.hooks.settled()

    async def _load_again(self) -> None:
        """Behind a restart: what ran before goes on, if this fails."""
        try:
            await self._load(self.config.pairs)
            for number, sentence in enumerate(await self.hooks.detach_others(self.config.pairs)):
                self.troubles[f"nic {number}"] = sentence
                say(log, logging.ERROR, sentence)
        except ColoError as e:
            self.troubles["dataplane"] = f"the dataplane of the service before goes on, it can't be loaded anew: {e}"
            say(log, logging.ERROR, "the dataplane can't be loaded anew", error=e)

    async def _show_life(self) -> None:
        while True:
            for pair in self.all():
                pair.tick()
            shortest = min((pair.config.service_loss_after_ms for pair in self.pairs.values()), default=0)
            await asyncio.sleep(min(SIGN_S, shortest / LOOKS / 1000) or SIGN_S)

    def _walk_period_s(self) -> float:
        timeouts = [pair.config.compare_timeout_ms for pair in self.pairs.values()]
        return min(timeouts, default=1000) / LOOKS / 1000

    def _must_run(self, work: Coroutine[Any, Any, None]) -> None:
        def fail(task: asyncio.Task[None]) -> None:
            if not task.cancelled() and not self.ended.done():
                self.ended.set_exception(ServiceError("a part of the service has failed, see the log above"))

        self._tasks.spawn(work).add_done_callback(fail)
