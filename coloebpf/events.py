"""The ring buffer's events, as dicts that a log line or a rule can use."""

import ctypes as ct
import socket
from typing import Any

from coloebpf.errors import BpfError
from coloebpf.model import DROPS, EVENTS, REASONS

MAPPED_4 = bytes(10) + b"\xff\xff"  # begins an IPv4 address written as IPv6


def flow_of(key: Any) -> dict[str, Any]:
    """A flow's key in words: addresses, ports in host order, the guest's own VLAN ids."""

    def address(words: Any) -> str:
        packed = bytes(words)
        if packed.startswith(MAPPED_4):
            return socket.inet_ntop(socket.AF_INET, packed[len(MAPPED_4) :])
        return socket.inet_ntop(socket.AF_INET6, packed)

    return {
        "proto": key.proto,
        "guest": address(key.guest),
        "guest_port": socket.ntohs(key.guest_port),
        "remote": address(key.remote),
        "remote_port": socket.ntohs(key.remote_port),
        "vlans": [tag & 0xFFF for tag in key.vlan if tag],
    }


def event_of(raw: Any) -> dict[str, Any]:
    """One struct event."""
    kind = EVENTS.get(raw.kind, str(raw.kind))
    names = DROPS if kind == "high_water" else REASONS
    return {
        "kind": kind,
        "reason": names[raw.reason] if raw.reason < len(names) else str(raw.reason),
        "time_ns": raw.time_ns,
        "nic": raw.nic,
        "epoch": raw.epoch,
        "offset": raw.offset,
        "pvm_digest": f"{raw.pvm_digest:016x}",
        "svm_digest": f"{raw.svm_digest:016x}",
        "flow_number": raw.flow,
        "flow": flow_of(raw.key),
    }


class EventReader:
    """One consumer of a pinned ring buffer; two would share its events between them."""

    def __init__(self, fd: int, leaf: Any) -> None:
        from bcc import lib
        from bcc.libbcc import _RINGBUF_CB_TYPE

        self._lib = lib
        self._found: list[dict[str, Any]] = []
        self._most: int | None = None

        def take(_ctx: Any, data: int, _size: int) -> int:
            self._found.append(event_of(ct.cast(data, ct.POINTER(leaf)).contents))
            return -1 if len(self._found) == self._most else 0  # libbpf ends behind an event that has "failed"

        self._callback = _RINGBUF_CB_TYPE(take)  # kept: C holds only its address
        self._ring = lib.bpf_new_ringbuf(fd, self._callback, None)
        if not self._ring:
            raise BpfError("can't read the ring buffer of events")

    def read(self, timeout_s: float, most: int | None = None) -> list[dict[str, Any]]:
        """Everything that is there, or the first `most`; waits for the first up to `timeout_s` seconds.

        A full ring holds some 9,000, and to put one into words takes 7 us: who has other things to do takes them in
        parts. As long as there are more, the ring's descriptor is readable.
        """
        self._found, self._most = [], most
        if timeout_s > 0:
            self._lib.bpf_poll_ringbuf(self._ring, int(timeout_s * 1000))
        if not self._found or most is None:
            self._lib.bpf_consume_ringbuf(self._ring)
        return self._found

    def close(self) -> None:
        """Gives back the ring's memory and descriptor; read() must not be called again."""
        self._lib.bpf_free_ringbuf(self._ring)
