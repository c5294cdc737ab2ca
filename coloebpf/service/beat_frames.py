"""Heartbeats as frames on the forward link: their bytes, and sending them. The XDP program on fwd receives them.

    Ethernet    to everybody, from fwd's own address, 802.1Q tag where fwd is shared, Ethertype 0x88B5
    payload     "COLO", version 1, cookie of the sender's service (16 bytes), counter (8 bytes)

0x88B5 is IEEE's Ethertype for local experiments. The counter is two numbers of 4 bytes, big endian: the beat's own, and
the newest that was heard of the other host and is answered with a grant to speak (witness.py), or 0.
"""

from __future__ import annotations

import logging
import socket
import struct

from coloebpf.model import FwdBeat
from coloebpf.service.log import say

__all__ = ["FwdBeat", "FwdSender", "frame"]

log = logging.getLogger(__name__)

ETHERTYPE, VLAN_ETHERTYPE = 0x88B5, 0x8100
MAGIC, VERSION = b"COLO", 1
BROADCAST = b"\xff" * 6
SHORTEST = 60  # bytes of an Ethernet frame without its checksum
PAYLOAD = struct.Struct("!4sB16sII")


def frame(source: bytes, vlan: int, cookie: bytes, number: int, echo: int) -> bytes:
    """One heartbeat; `vlan` 0: no tag."""
    tag = struct.pack("!HH", VLAN_ETHERTYPE, vlan) if vlan else b""
    payload = PAYLOAD.pack(MAGIC, VERSION, cookie, number, echo)
    return (BROADCAST + source + tag + ETHERTYPE.to_bytes(2, "big") + payload).ljust(SHORTEST + len(tag), b"\0")


class FwdSender:
    """Sends a NIC's heartbeats on its forward device, from the network namespace it is made in.

    A device that is down or gone costs beats, no more: it is said once, and tried anew with each.
    """

    def __init__(self, device: str, vlan: int) -> None:
        self.device, self.vlan = device, vlan
        self.sent = self.failed = 0
        self._socket: socket.socket | None = None
        self._mac = bytes(6)
        self._said = False

    def send(self, cookie: bytes, number: int, echo: int) -> bool:
        """False if it could not be sent."""
        try:
            opened = self._opened()
            opened.send(frame(self._mac, self.vlan, cookie, number, echo))
        except OSError as e:
            self.close()  # a device of the same name may come back under another number
            self.failed += 1
            if not self._said:
                say(log, logging.WARNING, "can't send heartbeats on fwd", device=self.device, error=e.strerror)
            self._said = True
            return False
        if self._said:
            say(log, logging.INFO, "heartbeats are sent on fwd again", device=self.device)
        self._said = False
        self.sent += 1
        return True

    def _opened(self) -> socket.socket:
        if self._socket is None:
            # Protocol 0: this socket receives nothing, all that comes in on fwd is the programs'.
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
            try:
                made.bind((self.device, 0))
                self._mac = made.getsockname()[4]
            except OSError:
                made.close()
                raise
            self._socket = made
        return self._socket

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
