"""A NIC's entries in the maps: which devices it has, and what the programs do there."""

from __future__ import annotations

import ctypes as ct
from contextlib import ExitStack
from typing import Any

from coloebpf import bpfsys, netdev
from coloebpf.errors import ConfigError
from coloebpf.model import MAX_NICS, MAX_PAIRS, NicSpec, Role
from coloebpf.pins import ENTRIES_LOCK, Maps

MAX_VLAN = 4094


def check_spec(spec: NicSpec) -> bytes:
    """The guest's MAC as bytes, zeros for any. Raises ConfigError for what a NIC can't have."""
    if not 0 <= spec.nic < MAX_NICS or not 0 <= spec.pair < MAX_PAIRS:
        raise ConfigError(f"nic {spec.nic}, pair {spec.pair}: both must be between 0 and {MAX_NICS - 1}")
    if not 0 <= spec.vlan <= MAX_VLAN:
        raise ConfigError(f"vlan {spec.vlan} of {spec.vif}: must be between 0 (none) and {MAX_VLAN}")
    try:
        mac = bytes.fromhex(spec.mac.replace(":", "")) if spec.mac else bytes(6)
    except ValueError:
        mac = b""
    if len(mac) != 6:
        raise ConfigError(f"mac {spec.mac!r} of {spec.vif} is not a MAC address such as 02:c0:10:00:00:01")
    return mac


class NicEntries:
    """Those of all NICs; devices are ifindexes."""

    def __init__(self, maps: Maps) -> None:
        self._fd, self._kinds = maps.fd, maps.shapes

    def vifs(self, spec: NicSpec, devices: netdev.Devices) -> list[netdev.Device]:
        """Those that get hooks, the one that the guest is behind first."""
        both = [devices.find(name) for name in (spec.vif, spec.standby_vif) if name]
        before = self._kinds.leaf("nic_by_id")()
        bpfsys.lookup(self._fd("nic_by_id"), ct.c_uint32(spec.nic), before)
        both.sort(key=lambda vif: vif.index != before.vif)  # stable: `vif` is first if it was neither
        return both if spec.role == Role.SECONDARY else both[:1]

    def flags_of_vifs(self, nic: int) -> dict[int, int]:
        """By ifindex, for the vifs that a NIC has."""
        found, value = {}, self._kinds.leaf("nics")()
        for key in bpfsys.keys(self._fd("nics"), ct.c_uint32):
            if bpfsys.lookup(self._fd("nics"), key, value) and value.id == nic:
                found[key.value] = value.flags
        return found

    def same(self, spec: NicSpec, mac: bytes, vif: int, fwd: int) -> bool:
        """register() would write what is there."""
        there = self._kinds.leaf("nics")()
        if not bpfsys.lookup(self._fd("nics"), ct.c_uint32(vif), there):
            return False
        wanted = self._nic(spec, mac, vif, fwd)
        wanted.exempts, wanted.flags = there.exempts, there.flags
        return bytes(wanted) == bytes(there)

    def _nic(self, spec: NicSpec, mac: bytes, vif: int, fwd: int) -> Any:
        nic = self._kinds.leaf("nics")()
        nic.id, nic.pair, nic.role = spec.nic, spec.pair, int(spec.role)
        nic.vif, nic.fwd, nic.vlan, nic.mac[:] = vif, fwd, spec.vlan, mac
        nic.arp, nic.nd, nic.other = int(spec.arp), int(spec.nd), int(spec.other)
        return nic

    def register(self, undo: ExitStack, spec: NicSpec, mac: bytes, fwd: int, made: dict[int, int]) -> None:
        """Writes all of a NIC's, and hands to `undo` what brings back those that were there before.

        `made`: flags by ifindex of the vifs, the guest's own first.
        """
        before = self.flags_of_vifs(spec.nic)
        link = self._kinds.key("links")()
        link.fwd, link.vlan = fwd, spec.vlan
        nic_by_id = ct.c_uint32(spec.nic)
        with ENTRIES_LOCK:
            kept = self._kinds.leaf("nic_by_id")()
            bpfsys.lookup(self._fd("nic_by_id"), nic_by_id, kept)
            own = (
                kept.vif if kept.vif in made else next(iter(made))
            )  # it may have been exchanged since the caller looked
            for vif, flags in made.items():
                nic = self._nic(spec, mac, vif, fwd)
                nic.exempts = kept.exempts  # the exemption map is by NIC, whatever device it had
                nic.flags = before.get(vif, 0) | flags
                self._put(undo, "nics", ct.c_uint32(vif), nic)
                if vif == own:
                    if kept.vif == own:
                        nic.next_vif, nic.next_epoch = kept.next_vif, kept.next_epoch
                    undo.callback(self._put_back, nic_by_id, kept, kept.vif == own)
                    bpfsys.update(self._fd("nic_by_id"), nic_by_id, nic)
        self._put(undo, "links", link, ct.c_uint32(spec.nic))
        for vif in before.keys() - made.keys():
            bpfsys.delete(self._fd("nics"), ct.c_uint32(vif))  # one that this NIC had before it was made again

    def _put_back(self, nic_by_id: ct.c_uint32, before: Any, same: bool) -> None:
        """What was there before attach(). `same`: the guest was where it is, so what became of it since counts."""
        with ENTRIES_LOCK:
            if same:
                now = type(before)()
                bpfsys.lookup(self._fd("nic_by_id"), nic_by_id, now)
                before.vif, before.next_vif, before.next_epoch = now.vif, now.next_vif, now.next_epoch
            bpfsys.update(self._fd("nic_by_id"), nic_by_id, before)

    def _put(self, undo: ExitStack, table: str, key: Any, value: Any) -> None:
        """Writes an entry; `undo` will bring back what was there."""
        before = type(value)()
        if bpfsys.lookup(self._fd(table), key, before):
            undo.callback(bpfsys.update, self._fd(table), key, before)
        else:
            undo.callback(bpfsys.delete, self._fd(table), key)
        bpfsys.update(self._fd(table), key, value)

    def remove_link(self, nic: int) -> tuple[int, bool]:
        """Of fwd to the NIC. Returns fwd, and whether no other NIC uses it."""
        value, link = self._kinds.leaf("nics")(), self._kinds.key("links")()
        bpfsys.lookup(self._fd("nic_by_id"), ct.c_uint32(nic), value)
        link.fwd, link.vlan = value.fwd, value.vlan
        bpfsys.delete(self._fd("links"), link)
        return value.fwd, not any(key.fwd == value.fwd for key in bpfsys.keys(self._fd("links"), type(link)))

    def remove(self, nic: int) -> None:
        """Those of the NIC and its vifs."""
        for vif in self.flags_of_vifs(nic):
            bpfsys.delete(self._fd("nics"), ct.c_uint32(vif))
        bpfsys.update(self._fd("nic_by_id"), ct.c_uint32(nic), self._kinds.leaf("nics")())
