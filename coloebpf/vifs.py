"""On a secondary whose engine makes a new VM for each checkpoint: which vif the SVM is behind.

The programs take it from the pair's epoch (vif_in() of bpf/frame.h), so the write that ends the old SVM's translations
is the one that exchanges the SVM, for all NICs of the pair.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Mapping
from typing import Any, Protocol

from coloebpf import bpfsys
from coloebpf.control import Control
from coloebpf.pins import ENTRIES_LOCK


class SvmVifs(Protocol):
    """What an engine needs of it."""

    def offer(self, vifs: Mapping[int, int]) -> None: ...
    def withdraw(self) -> None: ...
    def settle(self) -> None: ...
    def here(self, nic: int) -> int: ...


class Vifs:
    """Of one pair, with NICs of the numbers `nics`. All device numbers are ifindexes."""

    def __init__(self, control: Control, pair: int, nics: tuple[int, ...]) -> None:
        self._control, self._pair, self._nics = control, pair, nics

    def offer(self, vifs: Mapping[int, int]) -> None:
        """From the pair's next epoch on the SVM is behind these, by the NICs' numbers."""
        epoch = (self._control.state(self._pair).epoch + 1) & 0xFFFFFFFF
        for nic in self._nics:
            self._change(nic, next_vif=vifs[nic], next_epoch=epoch)

    def withdraw(self) -> None:
        """The SVM stays the one it was: if the epoch has come, it is taken back, and with it the old translations.

        Not behind a settle() that did not come to its end: then there is no way back for the other NICs either.
        """
        word = self._control.state(self._pair)
        with ENTRIES_LOCK:
            nics = [self._read(nic) for nic in self._nics]
        on_trial = [nic.next_vif not in (0, nic.vif) and nic.next_epoch == word.epoch for nic in nics]
        if any(on_trial) and not all(on_trial):
            self.settle()
        elif any(on_trial):
            self._control.set_epoch(self._pair, (word.epoch - 1) & 0xFFFFFFFF)
        for nic in self._nics:
            self._change(nic, next_vif=0, next_epoch=0)

    def settle(self) -> None:
        """There is no way back: the SVM is the offered one from here on, if its epoch has come."""
        epoch = self._control.state(self._pair).epoch
        for nic in self._nics:
            value = self._read(nic)
            if value.next_vif and (epoch - value.next_epoch) & 0xFFFFFFFF < 1 << 31:
                # First the one, then the other: between the two both ways of reading it say the same.
                self._change(nic, vif=value.next_vif)
                self._change(nic, next_vif=0, next_epoch=0)

    def here(self, nic: int) -> int:
        """The vif that a NIC's guest is behind now; 0: the NIC is not attached."""
        return int(self._read(nic).vif)

    def _read(self, nic: int) -> Any:
        value = self._control.shapes.leaf("nic_by_id")()
        bpfsys.lookup(self._control.fd("nic_by_id"), ct.c_uint32(nic), value)
        return value

    def _change(self, nic: int, **fields: int) -> None:
        with ENTRIES_LOCK:
            value = self._read(nic)
            for name, number in fields.items():
                setattr(value, name, number)
            bpfsys.update(self._control.fd("nic_by_id"), ct.c_uint32(nic), value)
