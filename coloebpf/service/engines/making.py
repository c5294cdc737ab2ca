"""A pair's engine, as its configuration names it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from functools import partial

from coloebpf.control import Control, PairState
from coloebpf.errors import NotifyError
from coloebpf.model import Role, State
from coloebpf.service.checks import live
from coloebpf.service.checks.finding import Host
from coloebpf.service.config import LibxlLiveConfig, PairConfig, QemuConfig
from coloebpf.service.disks import ColoDisk
from coloebpf.service.engine import Emit, Engine, Say
from coloebpf.service.engines import xl
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.libxl_colo import LibxlColoEngine, kept_name
from coloebpf.service.engines.model import ModelEngine
from coloebpf.service.engines.qemu_primary import QemuPrimary
from coloebpf.service.engines.qemu_secondary import QemuSecondary
from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.service.engines.xen_domains import Domains
from coloebpf.service.engines.xen_primary import XenPrimary
from coloebpf.service.engines.xen_secondary import XenSecondary
from coloebpf.service.engines.xen_stream import Stream
from coloebpf.service.engines.xl_primary import XlPrimary
from coloebpf.service.engines.xl_secondary import XlSecondary
from coloebpf.service.fdstore import Kept, Notifier
from coloebpf.service.log import say
from coloebpf.service.peer.messages import MAX_REASON, EngineWord, Message
from coloebpf.vifs import Vifs
from coloebpf.xen import ports
from coloebpf.xen.guest import port_of
from coloebpf.xen.watcher import Watcher

log = logging.getLogger("coloebpf.engines")


def make(
    pair: PairConfig,
    notifier: Notifier,
    control: Control,
    watcher: Watcher,
    send: Callable[[Message], object],
    emit: Emit,
    *,
    encryption: Encryption | None,
) -> Engine:
    """The engine, not started. `watcher`: of this host's Xen domains; `send`: to the other host's service.

    `encryption`: of what is copied to the other host.
    """
    if pair.qemu is not None and pair.engine == "qemu":
        return _qemu(pair, pair.qemu, control, send, emit, encryption)
    if pair.libxl_live is not None and pair.engine == "libxl-live":
        return _libxl_live(pair, pair.libxl_live, control, watcher, send, emit, encryption)
    if pair.relayed:
        return _relayed(pair, control, watcher, send, emit, encryption)
    if pair.libxl_colo is not None and pair.engine == "libxl-colo":
        alive = partial(xl.domain_alive, pair.libxl_colo.domain)
        return LibxlColoEngine(pair.name, pair.role, pair.libxl_colo.listen, emit, alive, notifier)
    return ModelEngine(emit, pair.model.commit_delay_ms / 1000, pair.model.socket, copies=pair.model.copies)


def _teller(pair: PairConfig, send: Callable[[Message], object]) -> Say:
    """A word to the other host's engine; of long ones the end is what matters: libxl's own last words, say."""

    def tell(word: str, number: int, detail: str) -> None:
        send(EngineWord(pair.number, word, number, detail[-MAX_REASON:]))

    return tell


def _qemu(
    pair: PairConfig,
    qemu: QemuConfig,
    control: Control,
    send: Callable[[Message], object],
    emit: Emit,
    encryption: Encryption | None,
) -> Engine:
    tell = _teller(pair, send)
    if pair.role is Role.PRIMARY:
        return QemuPrimary(Vms.of(pair, qemu, encryption), emit, tell, lambda: control.state(pair.number).state)
    nics = tuple(nic.number for nic in pair.nics)
    vifs = Vifs(control, pair.number, nics)
    return QemuSecondary(nics, Vms.of(pair, qemu, encryption), vifs, emit, tell, lambda: control.state(pair.number))


def _libxl_live(
    pair: PairConfig,
    config: LibxlLiveConfig,
    control: Control,
    watcher: Watcher,
    send: Callable[[Message], object],
    emit: Emit,
    encryption: Encryption | None,
) -> Engine:
    tell = _teller(pair, send)
    nics = tuple(nic.number for nic in pair.nics)
    vifs = Vifs(control, pair.number, nics)
    domains, lacks = Domains.of(pair, config, watcher, encryption), _lacks(pair)
    if pair.role is Role.PRIMARY:
        return XenPrimary(
            domains,
            emit,
            tell,
            lambda: control.state(pair.number).state,
            lambda: vifs.here(nics[0]),
            [nic.mac for nic in pair.nics],
            lacks=lacks,
        )
    return XenSecondary(nics, domains, vifs, ports, emit, tell, lambda: control.state(pair.number), lacks=lacks)


def _relayed(
    pair: PairConfig,
    control: Control,
    watcher: Watcher,
    send: Callable[[Message], object],
    emit: Emit,
    encryption: Encryption | None,
) -> Engine:
    tell = _teller(pair, send)

    def state() -> State:
        return control.state(pair.number).state

    if pair.libxl_remus is not None and pair.engine == "libxl-remus":
        stream = Stream.of_remus(pair.name, pair.libxl_remus, encryption)
    else:
        assert pair.libxl_colo is not None
        stream = Stream.of_colo(pair.name, pair.libxl_colo, ColoDisk.of(pair), encryption)
    if pair.role is Role.PRIMARY:
        behind, macs = [port_of(nic.vif) for nic in pair.nics], [nic.mac for nic in pair.nics]
        return XlPrimary(stream, watcher, behind, macs, emit, tell, state, _lacks(pair))
    return XlSecondary(stream, watcher, [nic.vif for nic in pair.nics], ports, emit, tell, state, _lacks(pair))


def _lacks(pair: PairConfig) -> Callable[[], str]:
    return lambda: live.lacks(pair, Host(now=time.time()))


def reconfigure(engine: Engine, pair: PairConfig) -> None:
    """What a reload may change in a running engine."""
    if isinstance(engine, ModelEngine):
        engine.commit_delay_s = pair.model.commit_delay_ms / 1000


class KeptConnections:
    """libxl's connections that an earlier process accepted, and systemd has kept."""

    def __init__(self, kept: Iterable[Kept], notifier: Notifier) -> None:
        self._kept: dict[str, Kept] = {}
        self._notifier = notifier
        for one in kept:
            if one.name in self._kept:  # the newest is the one in use
                self._kept[one.name].close()
            self._kept[one.name] = one

    def hand_over(self, pair: PairConfig, engine: Engine, state: PairState) -> None:
        """To an engine before its start, if there is one for it. In any state but lock-step a checkpoint may be due."""
        if not isinstance(engine, LibxlColoEngine) or (one := self._kept.pop(kept_name(pair.name), None)) is None:
            return
        try:
            engine.adopt(one.socket(), outstanding=state.state is not State.LOCKSTEP)
        except NotifyError as e:
            say(log, logging.ERROR, "what systemd has kept is of no use", pair=pair.name, error=e)
            one.close()

    def close(self) -> None:
        """Nobody wants the rest."""
        for name, one in self._kept.items():
            say(log, logging.WARNING, "a kept connection is of no pair any more", name=name)
            self._notifier.drop(name)
            one.close()
        self._kept.clear()
