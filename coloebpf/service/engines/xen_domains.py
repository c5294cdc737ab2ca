"""A pair's domains on this host: the guest by its name, and copies of it, one behind each of the NICs' two ports."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path

from coloebpf.errors import XenError
from coloebpf.service.config import LibxlLiveConfig, PairConfig
from coloebpf.service.engines.encryption import Encryption
from coloebpf.service.engines.xen_toolstack import Toolstack
from coloebpf.service.log import say
from coloebpf.xen.client import ARGV
from coloebpf.xen.guest import Wrong, port_of, ports_of, unfit
from coloebpf.xen.libxl import Domain
from coloebpf.xen.watcher import Watcher

SLOTS = (0, 1)

logger = logging.getLogger("coloebpf.xen")


def index_of(vif: str) -> int:
    """A device's number. Raises XenError if it is not there."""
    try:
        return socket.if_nametoindex(vif)
    except OSError as e:
        raise XenError(f"there is no port {vif}: the service makes it at its start") from e


class Domains(Toolstack):
    """`vifs`: names of the devices of each slot, in the order of the pair's NICs. Its methods raise XenError."""

    def __init__(
        self,
        pair: str,
        config: LibxlLiveConfig,
        vifs: Sequence[tuple[str, ...]],
        watcher: Watcher,
        argv: Sequence[str] = ARGV,
        encryption: Encryption | None = None,
    ) -> None:
        home, step_s, end_s = config.run_dir / pair, config.step_timeout_s, config.copy_timeout_s
        super().__init__(pair, config.domain, home, step_s, end_s, watcher, argv)
        self.config, self.encryption = config, encryption
        self._vifs = vifs

    @classmethod
    def of(cls, pair: PairConfig, config: LibxlLiveConfig, watcher: Watcher, encryption: Encryption | None) -> Domains:
        """As the pair's configuration says."""
        vifs = [tuple((nic.vif, nic.standby_vif)[slot] for nic in pair.nics) for slot in SLOTS]
        return cls(pair.name, config, vifs, watcher, encryption=encryption)

    def vifs(self, slot: int) -> tuple[str, ...]:
        """Names of the slot's devices."""
        return self._vifs[slot]

    def ports(self, slot: int) -> list[str]:
        """What a domain in this slot has for bridges."""
        return [port_of(vif) for vif in self._vifs[slot]]

    def name(self, slot: int) -> str:
        """Of the copy there."""
        return f"{self.config.domain}--{slot}"

    # ---- looking ---------------------------------------------------------------------------------------------------

    async def copy(self, slot: int) -> Domain | None:
        """The one in this slot."""
        return await self.named(self.name(slot))

    async def unfit(self, domid: int) -> list[Wrong]:
        """Why this guest can't be protected."""
        return unfit(
            await self.configuration(domid), [sorted(ports) for ports in zip(*map(self.ports, SLOTS), strict=True)]
        )

    async def slot_of(self, domid: int) -> int | None:
        """Where a domain is."""
        ports = ports_of(await self.configuration(domid))
        return next((slot for slot in SLOTS if self.ports(slot) == ports), None)

    # ---- acting ----------------------------------------------------------------------------------------------------

    async def take_name(self, slot: int) -> None:
        """The copy there is the guest now."""
        if (copy := await self.copy(slot)) is not None:
            await self.rename(copy.domid, copy.name, self.domain)

    def new_uuid(self, slot: int) -> str:
        """Of the next copy there. It is written down first: a restore that is killed may leave it without a name."""
        fresh = str(uuid.uuid4())
        try:
            self.home.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._note(slot).write_text(json.dumps(fresh))
        except OSError as e:
            raise XenError(f"{self._note(slot)} can't be written: {e.strerror}") from e
        return fresh

    async def clear(self, slot: int) -> None:
        """Destroys what is in the slot, whole or half."""
        noted = ""
        with contextlib.suppress(OSError, ValueError):
            noted = json.loads(self._note(slot).read_text())
        for domain in await self.all():
            # A promoted copy keeps its UUID and has the guest's name.
            if domain.name == self.name(slot) or (domain.uuid == noted and domain.name != self.config.domain):
                say(logger, logging.INFO, "a copy is destroyed", pair=self.pair, domain=domain.domid)
                await self.destroy(domain.domid)

    def _note(self, slot: int) -> Path:
        return self.home / f"{slot}.json"
