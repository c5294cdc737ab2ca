"""Exemptions: traffic that passes uncompared, as the map `exempt` has it."""

from __future__ import annotations

import ctypes as ct
import ipaddress
import socket
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from coloebpf import bpfsys
from coloebpf.errors import ConfigError
from coloebpf.model import MAX_NICS
from coloebpf.pins import ENTRIES_LOCK

if TYPE_CHECKING:
    from coloebpf.control import Control

FIELDS_BITS = 32  # of struct exempt_key before `remote`: a prefix of the trie covers them always
MAPPED_4 = bytes(10) + b"\xff\xff"  # begins an IPv4 address written as IPv6


def exemption(proto: int, guest_port: int, remote: str, nic: int) -> tuple[int, bytes]:
    """Bits of an exemption's key that count, and its address as 16 bytes. Raises ConfigError for what can't be one."""
    try:
        net = ipaddress.ip_network(remote, strict=False)
    except ValueError as e:
        raise ConfigError(f"remote {remote!r} is no address prefix such as 10.0.0.0/8 or fd00::/8") from e
    for what, number, top in (("protocol", proto, 255), ("port", guest_port, 65535), ("NIC", nic, MAX_NICS - 1)):
        if not 0 <= number <= top:
            raise ConfigError(f"exemption of {what} {number}: must be between 0 and {top}")
    address = net.network_address.packed
    mapped = MAPPED_4 + address if net.version == 4 else address
    return FIELDS_BITS + 8 * (16 - len(address)) + net.prefixlen, mapped


def add(control: Control, proto: int, guest_port: int, remote: str, nic: int) -> None:
    """Lets traffic pass uncompared: IP protocol, the guest's port (0: every), the other side's prefix."""
    bpfsys.update(control.fd("exempt"), _key(control, proto, guest_port, remote, nic), ct.c_uint32(1))
    _note(control, nic)


def remove(control: Control, proto: int, guest_port: int, remote: str, nic: int) -> bool:
    """False if there was no such entry."""
    found = bpfsys.delete(control.fd("exempt"), _key(control, proto, guest_port, remote, nic))
    _note(control, nic)
    return found


def replace(control: Control, nic: int, wanted: Iterable[tuple[int, int, str]]) -> None:
    """Makes these (protocol, guest's port, prefix) all the exemptions of a NIC; those that stay are never gone."""
    keys = {bytes(key): key for key in (_key(control, *one, nic) for one in wanted)}
    entries = list(bpfsys.keys(control.fd("exempt"), control.shapes.key("exempt")))
    there = {bytes(entry): entry for entry in entries if entry.nic == nic}
    for raw in keys.keys() - there.keys():
        bpfsys.update(control.fd("exempt"), keys[raw], ct.c_uint32(1))
    for raw in there.keys() - keys.keys():
        bpfsys.delete(control.fd("exempt"), there[raw])
    _note(control, nic)


def _key(control: Control, proto: int, guest_port: int, remote: str, nic: int) -> Any:
    prefixlen, mapped = exemption(proto, guest_port, remote, nic)
    key = control.shapes.key("exempt")()
    key.prefixlen, key.proto, key.nic, key.guest_port = prefixlen, proto, nic, socket.htons(guest_port)
    ct.memmove(ct.addressof(key) + type(key).remote.offset, mapped, len(mapped))
    return key


def _note(control: Control, nic: int) -> None:
    """A NIC without exemptions does not search for them, whichever of its vifs the guest is behind."""
    entries = bpfsys.keys(control.fd("exempt"), control.shapes.key("exempt"))
    any_left = int(any(entry.nic == nic for entry in entries))
    with ENTRIES_LOCK:
        vifs = list(bpfsys.keys(control.fd("nics"), ct.c_uint32))
        for table, key in (("nic_by_id", ct.c_uint32(nic)), *(("nics", vif) for vif in vifs)):
            value = control.shapes.leaf(table)()
            if bpfsys.lookup(control.fd(table), key, value) and (table == "nic_by_id" or value.id == nic):
                value.exempts = any_left
                bpfsys.update(control.fd(table), key, value)
