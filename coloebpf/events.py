"""The ring buffer's events, as dicts that a log line or a rule can use."""

import ctypes as ct
import ipaddress
import socket
from typing import Any

from coloebpf.errors import BpfError
from coloebpf.model import DROPS, EVENTS, REASONS


def flow_of(key: Any) -> dict[str, Any]:
    """A flow's key in words: addresses, ports in host order, the guest's own VLAN ids."""

    def address(words: Any) -> str:
        found = ipaddress.IPv6Address(bytes(words))
        return str(found.ipv4_mapped or found)

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

        def take(_ctx: Any, data: int, _size: int) -> int:
            self._found.append(event_of(ct.cast(data, ct.POINTER(leaf)).contents))
            return 0

        self._callback = _RINGBUF_CB_TYPE(take)  # kept: C holds only its address
        self._ring = lib.bpf_new_ringbuf(fd, self._callback, None)
        if not self._ring:
            raise BpfError("can't read the ring buffer of events")

    def read(self, timeout_s: float) -> list[dict[str, Any]]:
        """Everything that is there; waits for the first up to `timeout_s` seconds."""
        self._found = []
        if timeout_s > 0:
            self._lib.bpf_poll_ringbuf(self._ring, int(timeout_s * 1000))
        self._lib.bpf_consume_ringbuf(self._ring)
        return self._found

    def close(self) -> None:
        """Gives back the ring's memory and descriptor; read() must not be called again."""
        self._lib.bpf_free_ringbuf(self._ring)
