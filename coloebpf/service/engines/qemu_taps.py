"""A pair's taps on the secondary: which slot's clients' frames go to, now or from the next epoch on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from coloebpf.service.engines.qemu_vms import Vms
from coloebpf.vifs import SvmVifs


class Taps:
    """`nics`: their numbers, in the order of each slot's taps; `index`: a device's number, by its name."""

    def __init__(self, nics: Sequence[int], vms: Vms, vifs: SvmVifs, index: Callable[[str], int]) -> None:
        self._nics, self._vms, self._vifs, self._index = nics, vms, vifs, index

    def offer(self, slot: int) -> None:
        """From the pair's next epoch on: the slot's."""
        taps = self._vms.taps(slot)
        self._vifs.offer({nic: self._index(tap) for nic, tap in zip(self._nics, taps, strict=True)})

    def withdraw(self) -> None:
        """What was offered is not: see SvmVifs."""
        self._vifs.withdraw()

    def settle(self) -> None:
        """There is no way back from what was offered: see SvmVifs."""
        self._vifs.settle()

    def in_use(self, slot: int) -> bool:
        """Now: the slot's."""
        return self._index(self._vms.taps(slot)[0]) == self._vifs.here(self._nics[0])
