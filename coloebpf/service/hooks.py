"""This host's dataplane as the configuration wants it: loaded, on the NICs' devices, with exemptions and timeouts.

Compiling takes seconds and netlink some 0.1 s, so both are done in worker threads, in the network namespace of the
process.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from coloebpf import pins, snapshot
from coloebpf.control import Control
from coloebpf.dataplane import Dataplane
from coloebpf.detaching import detach
from coloebpf.errors import DeviceError, ServiceError
from coloebpf.model import Role, Sizes, State
from coloebpf.service.config import Config, Exemption, NicConfig, PairConfig
from coloebpf.service.control_socket import answers
from coloebpf.service.log import say
from coloebpf.xen import ports

log = logging.getLogger("coloebpf.hooks")

MS = 1_000_000  # ns
LOADING = "the dataplane is being loaded: wait for some seconds"


class Hooks:
    """The dataplane at `pin_dir`. `control` is there from open() on."""

    def __init__(self, pin_dir: Path, sizes: Sizes) -> None:
        self.pin_dir, self._sizes = pin_dir, sizes
        self._plane: Dataplane | None = None
        self._same = False  # its programs ran before
        self._control: Control | None = None

    @property
    def running(self) -> bool:
        """An earlier service has left a dataplane that goes on."""
        return pins.any_there(self.pin_dir)

    @property
    def control(self) -> Control:
        """Raises ServiceError before it is there."""
        if self._control is None:
            raise ServiceError(LOADING)
        return self._control

    def open(self) -> Control:
        """Works what is pinned. Raises BpfError if not all of it is there."""
        self._control = Control.open(self.pin_dir)
        return self._control

    async def load(self) -> None:
        """Compiles and loads, unless the running programs are the same; attach() replaces those. Raises ColoError."""
        begin = time.monotonic()
        self._plane = await asyncio.to_thread(Dataplane.reuse, self.pin_dir, self._sizes)
        self._same = self._plane is not None
        if not self._same:
            self._plane = await asyncio.to_thread(Dataplane.load, self.pin_dir, self._sizes)
        took_s = f"{time.monotonic() - begin:.1f}"
        say(log, logging.INFO, "dataplane is loaded", pins=self.pin_dir, as_before=self._same, took_s=took_s)

    async def attach(self, pair: PairConfig) -> None:
        """Puts the programs on the pair's devices, in place of others of ours. Raises a child of ColoError."""
        plane = self._loaded()
        for nic in pair.nics:
            spec = nic.spec(pair)
            if pair.on_ports:
                await asyncio.to_thread(_make_ports, pair, nic, plane.sizes.mtu)
            if self._same and await asyncio.to_thread(plane.is_attached, spec):
                continue
            await asyncio.to_thread(plane.attach, spec)
            say(log, logging.INFO, "attached", pair=pair.name, nic=nic.number, vif=nic.vif, fwd=nic.fwd)

    def check_loaded(self) -> None:
        """Raises ServiceError while pairs can neither be attached nor detached."""
        self._loaded()

    def settled(self) -> None:
        """All pairs are attached."""
        self._loaded().settled()

    async def detach(self, pair: PairConfig) -> None:
        """Takes them off."""
        for nic in pair.nics:
            self.control.set_exempts(nic.number, ())
            await asyncio.to_thread(self._loaded().detach, nic.number)
            say(log, logging.INFO, "detached", pair=pair.name, nic=nic.number, vif=nic.vif, fwd=nic.fwd)

    async def detach_others(self, pairs: Iterable[PairConfig]) -> list[str]:
        """Takes the programs off NICs that an earlier configuration had and `pairs` have not.

        Not off those of a protected pair: what is held would be lost, and an SVM speak. Returns a sentence for each.
        """
        named = {nic.number for pair in pairs for nic in pair.nics}
        kept = []
        for nic in snapshot.attached(self.control):
            if nic.id in named:
                continue
            state = self.control.state(nic.pair).state
            if state in (State.UNPROTECTED, State.PASSTHROUGH):
                self.control.set_exempts(nic.id, ())
                await asyncio.to_thread(self._loaded().detach, nic.id)
                say(log, logging.WARNING, "detached, for the configuration names it no more", nic=nic.id)
            else:
                kept.append(
                    f"NIC {nic.id} of pair number {nic.pair}, which is {state.name.lower()}, is not in the file "
                    "any more, and still attached: put it back, unprotect the pair, then take it out and restart"
                )
        return kept

    def exempt(self, pair: PairConfig) -> None:
        """Makes the maps have the pair's exemptions and no others; each is named in the log."""
        for nic in pair.nics:
            mine = [exempt for exempt in pair.exempts if exempt.nic == nic.number]
            self.control.set_exempts(nic.number, (_entry(exempt) for exempt in mine))
            for exempt in mine:
                say(
                    log, logging.WARNING, "passes uncompared", pair=pair.name, nic=nic.number,
                    protocol=exempt.protocol, guest_port=exempt.guest_port or "every", remote=exempt.remote,
                )  # fmt: skip

    def set_timeouts(self, pairs: Iterable[PairConfig]) -> None:
        """From when on the programs call a packet late, pair by pair."""
        for pair in pairs:
            self.control.set_compare_timeout(pair.number, pair.compare_timeout_ms * MS)

    def close(self) -> None:
        """Lets go of the maps; the dataplane goes on."""
        if self._control is not None:
            self._control.close()

    def _loaded(self) -> Dataplane:
        if self._plane is None:
            raise ServiceError(LOADING)
        return self._plane


def _make_ports(pair: PairConfig, nic: NicConfig, mtu: int) -> None:
    """What a killed secondary's service has left waiting must not be in a primary's way."""
    for vif in filter(None, (nic.vif, nic.standby_vif)):
        ports.ensure(vif, nic.bridge, mtu)
        if pair.role is Role.PRIMARY:
            with contextlib.suppress(DeviceError):  # nothing is held
                ports.release(vif)


def _entry(exempt: Exemption) -> tuple[int, int, str]:
    return exempt.protocol, exempt.guest_port, exempt.remote


def check_unneeded(config: Config) -> None:
    """Raises ServiceError if a pair is protected: what is held would be lost with the programs, and an SVM speak."""
    if not pins.any_there(config.host.pins):
        return
    with Control.open(config.host.pins) as control:
        for pair in config.pairs:
            state = control.state(pair.number).state
            if state not in (State.UNPROTECTED, State.PASSTHROUGH):
                raise ServiceError(f"pair {pair.name} is {state.name.lower()}: coloebpf unprotect {pair.name} first")


def take_down(config: Config) -> bool:
    """Takes the dataplane off this host, for good; False if there was none.

    Raises ServiceError while a service works it, or it is still needed.
    """
    if answers(config.host.control_socket):
        raise ServiceError("the service runs: stop it first (systemctl stop coloebpf)")
    if not pins.any_there(config.host.pins):
        return False
    check_unneeded(config)
    nics = [nic for pair in config.pairs for nic in pair.nics]
    devices = [device for nic in nics for device in (nic.vif, nic.standby_vif, nic.fwd) if device]
    detach(config.host.pins, devices)
    return True
