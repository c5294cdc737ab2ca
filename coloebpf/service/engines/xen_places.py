"""Where client frames go on the secondary: to which slot's ports, now or from the next epoch on; and how they wait."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Sequence
from typing import Protocol

from coloebpf.errors import DeviceError
from coloebpf.service.engines.xen_domains import Domains
from coloebpf.service.log import say
from coloebpf.vifs import SvmVifs

logger = logging.getLogger("coloebpf.xen")


class Ports(Protocol):
    """What coloebpf.xen.ports does: netlink, in a thread of its own. Both raise DeviceError."""

    def hold(self, vif: str) -> None: ...
    def release(self, vif: str) -> None: ...


class Places:
    """`nics`: their numbers, in the order of each slot's vifs; `index`: a device's number, by its name."""

    def __init__(
        self, nics: Sequence[int], domains: Domains, vifs: SvmVifs, ports: Ports, index: Callable[[str], int]
    ) -> None:
        self._nics, self._domains, self._vifs, self._ports, self._index = nics, domains, vifs, ports, index
        self.withdraw, self.settle = vifs.withdraw, vifs.settle

    async def hold(self, slot: int) -> None:
        """What will come for the slot waits."""
        try:
            for vif in self._domains.vifs(slot):
                await asyncio.to_thread(self._ports.hold, vif)
        except DeviceError as e:  # what comes before its tap is there is lost: a frame lost on fwd is no worse
            say(logger, logging.ERROR, "frames for the next SVM are not kept", pair=self._domains.pair, error=e)

    def offer(self, slot: int) -> None:
        """From the pair's next epoch on: to the slot's."""
        vifs = self._domains.vifs(slot)
        self._vifs.offer({nic: self._index(vif) for nic, vif in zip(self._nics, vifs, strict=True)})

    async def release(self, slot: int) -> None:
        """What waits goes to the guest."""
        for vif in self._domains.vifs(slot):
            with contextlib.suppress(DeviceError):  # nothing was held, which was told
                await asyncio.to_thread(self._ports.release, vif)

    def in_use(self, slot: int) -> bool:
        """Now: the slot's."""
        return self._index(self._domains.vifs(slot)[0]) == self._vifs.here(self._nics[0])
