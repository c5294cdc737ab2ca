"""Connections that clients know by other numbers than their guest (bpf/alias.h): kept, handed on, ended.

They come up when an SVM that was promoted becomes a PVM, and go with the guest from then on: to each new secondary, as
text for the services' link.
"""

from __future__ import annotations

import ctypes as ct
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from typing import Any

from coloebpf import bpfsys
from coloebpf.control import Control

# The NIC (as the pair counts them), ports, tags, addresses, both deltas, the guest's ISN and position, the
# client's ISN, ENDS as bits
FORM = struct.Struct("!5H16s16s5IB")
TEXT_LENGTH = 2 * FORM.size
ENDS = ("guest_fin", "client_fin", "reset", "doubt")
KIND_TCP = 1  # bpf/types.h
SLICE = 256  # entries: some 4 ms
IDLE_ALIAS_NS, IDLE_TCP_NS = 300 * 10**9, 432_000 * 10**9  # bpf/constants.h


class Aliases:
    """Those of one pair, with NICs of the numbers `nics`, in the order that both hosts have them in.

    What goes over all of them goes in slices, and yields behind each: with as many entries as the map can have the
    whole way takes more than a second, and whoever has an event loop must let others take turns.
    """

    def __init__(self, control: Control, pair: int, nics: tuple[int, ...]) -> None:
        self._control, self._pair, self._nics = control, pair, nics
        self._additions = 0

    def keep(self) -> int:
        """Before a promoted SVM becomes a PVM: makes entries of what its translations were. Returns how many are."""
        self._control.keep_numbers(self._pair)
        self._additions += 1
        count = sum(len(keys) for keys in self._slices())
        self._control.set_aliased(self._pair, count > 0)
        return count

    def texts(self) -> Iterator[list[str]]:
        """All of them, for the other host."""
        if self._control.aliased(self._pair):
            for keys in self._slices():
                yield [self._text(key, alias) for key, alias in self._found(keys)]

    def clear(self) -> Iterator[None]:
        """None is left."""
        if not self._control.aliased(self._pair):
            return
        before: list[Any] = []
        for keys in self._slices():
            for key in before:  # not these: the walk goes on behind their last one
                bpfsys.delete(self._fd, key)
            before = keys
            yield
        for key in before:
            bpfsys.delete(self._fd, key)
        self._control.set_aliased(self._pair, False)

    def take(self, texts: Sequence[str]) -> None:
        """What the other host has said, to those that are here. Raises ValueError for no such text."""
        for text in texts:
            bpfsys.update(self._fd, *self._read(text))
        if texts:
            self._additions += 1
            self._control.set_aliased(self._pair, True)

    def end_idle(self) -> Iterator[None]:
        """Those whose connections have ended go."""
        if not self._control.aliased(self._pair):
            return
        now, left, additions = time.monotonic_ns(), 0, self._additions
        for keys in self._slices():
            for key, alias in self._found(keys):
                closed = alias.reset or (alias.guest_fin and alias.client_fin)
                if now - alias.last_ns > (IDLE_ALIAS_NS if closed else IDLE_TCP_NS):
                    bpfsys.delete(self._fd, key)
                else:
                    left += 1
            yield
        if not left and additions == self._additions:
            self._control.set_aliased(self._pair, False)

    @property
    def _fd(self) -> int:
        return self._control.fd("aliases")

    def _slices(self) -> Iterator[list[Any]]:
        """The keys of the pair's entries, those of SLICE entries of the map at a time."""
        after, seen = None, set[bytes]()
        while found := bpfsys.some_keys(self._fd, self._control.shapes.key("aliases"), after, SLICE):
            after = found[-1]  # if it is gone by the next time, the map begins again
            fresh = [key for key in found if key.nic in self._nics and bytes(key) not in seen]
            seen.update(bytes(key) for key in fresh)
            yield fresh

    def _found(self, keys: list[Any]) -> Iterator[tuple[Any, Any]]:
        for key in keys:
            alias = self._control.shapes.leaf("aliases")()
            if bpfsys.lookup(self._fd, key, alias):
                yield key, alias

    def _text(self, key: Any, alias: Any) -> str:
        ends = sum(bool(getattr(alias, name)) << bit for bit, name in enumerate(ENDS))
        ports = socket.ntohs(key.guest_port), socket.ntohs(key.remote_port)
        words = alias.seq_delta, alias.ts_delta, alias.guest_isn, alias.guest_high, alias.client_isn
        addresses = bytes(key.guest), bytes(key.remote)
        return FORM.pack(self._nics.index(key.nic), *ports, *key.vlan, *addresses, *words, ends).hex()

    def _read(self, text: str) -> tuple[Any, Any]:
        try:
            nic, guest_port, remote_port, *rest = FORM.unpack(bytes.fromhex(text))
        except struct.error as e:
            raise ValueError(f"{text[:20]!r} is no alias: {e}") from e
        if nic >= len(self._nics):
            raise ValueError(f"the pair has no NIC {nic + 1}")
        key, alias = self._control.shapes.key("aliases")(), self._control.shapes.leaf("aliases")()
        key.nic, key.proto, key.kind = self._nics[nic], socket.IPPROTO_TCP, KIND_TCP
        key.guest_port, key.remote_port = socket.htons(guest_port), socket.htons(remote_port)
        key.vlan[:] = rest[:2]
        for field, address in (("guest", rest[2]), ("remote", rest[3])):
            ct.memmove(ct.addressof(key) + getattr(type(key), field).offset, address, len(address))
        alias.seq_delta, alias.ts_delta, alias.guest_isn, alias.guest_high, alias.client_isn, ends = rest[4:]
        for bit, name in enumerate(ENDS):
            setattr(alias, name, ends >> bit & 1)
        alias.last_ns = time.monotonic_ns()
        return key, alias
