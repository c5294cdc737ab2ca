"""Frames that came, read from their bytes alone, and their checksums."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heard:
    """A frame's headers, read from its bytes alone."""

    frame: bytes
    l3: int
    l4: int
    end: int  # of the IP packet
    proto: int

    @classmethod
    def of(cls, frame: bytes) -> Heard:
        off, kind = 14, int.from_bytes(frame[12:14], "big")
        while kind in (0x8100, 0x88A8):
            kind = int.from_bytes(frame[off + 2 : off + 4], "big")
            off += 4
        if kind == 0x0800:
            total = int.from_bytes(frame[off + 2 : off + 4], "big")
            cut = int.from_bytes(frame[off + 6 : off + 8], "big") & 0x3FFF
            head = (frame[off] & 15) * 4
            return cls(frame, off, off + head, off + total, -1 if cut else frame[off + 9])
        if kind == 0x86DD:
            end, proto, l4 = off + 40 + int.from_bytes(frame[off + 4 : off + 6], "big"), frame[off + 6], off + 40
            while proto in (0, 43, 60, 44):
                if proto == 44 and int.from_bytes(frame[l4 + 2 : l4 + 4], "big") & 0xFFF9:
                    return cls(frame, off, l4, end, -1)
                step = 8 if proto == 44 else (frame[l4 + 1] + 1) * 8
                proto, l4 = frame[l4], l4 + step
            return cls(frame, off, l4, end, proto)
        return cls(frame, off, off, len(frame), -1)

    def word(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.frame[self.l4 + offset : self.l4 + offset + size], "big")

    @property
    def seq(self) -> int:
        return self.word(4)

    @property
    def ack(self) -> int:
        return self.word(8)

    @property
    def window(self) -> int:
        return self.word(14, 2)

    @property
    def flags(self) -> int:
        return self.frame[self.l4 + 13]

    @property
    def data(self) -> bytes:
        return self.frame[self.l4 + (self.frame[self.l4 + 12] >> 4) * 4 : self.end]

    @property
    def tcp_options(self) -> bytes:
        return self.frame[self.l4 + 20 : self.l4 + (self.frame[self.l4 + 12] >> 4) * 4]

    @property
    def timestamps(self) -> tuple[int, int]:
        """Value and echo, wherever the option stands."""
        options, off = self.tcp_options, 0
        while off < len(options):
            if options[off] == 8:
                value, echo = struct.unpack("!II", options[off + 2 : off + 10])
                return value, echo
            off += 1 if options[off] == 1 else options[off + 1]
        raise AssertionError(f"no timestamps in {options.hex()}")

    @property
    def sack(self) -> list[int]:
        """All edges of the SACK blocks."""
        options, off = self.tcp_options, 0
        while off < len(options):
            if options[off] == 5:
                body = options[off + 2 : off + options[off + 1]]
                return [int.from_bytes(body[i : i + 4], "big") for i in range(0, len(body), 4)]
            off += 1 if options[off] == 1 else options[off + 1]
        return []

    def sums_hold(self) -> bool:
        """Are the IP and the TCP, UDP or ICMPv6 checksum right?"""
        frame, l3 = self.frame, self.l3
        six = frame[l3] >> 4 == 6
        if not six and ones_sum(frame[l3 : l3 + (frame[l3] & 15) * 4]) != 0xFFFF:
            return False
        if self.proto not in (6, 17, 58) or (self.proto == 58 and not six):
            return True
        body = frame[self.l4 : self.end]
        if self.proto == 17:
            body = body[: int.from_bytes(body[4:6], "big")]
            if not six and body[6:8] == b"\0\0":
                return True
        ends = frame[l3 + 8 : l3 + 40] if six else frame[l3 + 12 : l3 + 20]
        return ones_sum(ends + struct.pack("!II", len(body), self.proto) + body) == 0xFFFF


def ones_sum(data: bytes) -> int:
    """One's complement sum of 16-bit words (RFC 1071)."""
    total: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + b"\0" * (len(data) % 2)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


def but_acks(frame: bytes) -> bytes:
    """The frame without what a release may lower: ACK number, window, TCP checksum."""
    heard = Heard.of(frame)
    if heard.proto != 6:
        return frame
    at = heard.l4
    return frame[: at + 8] + bytes(4) + frame[at + 12 : at + 14] + bytes(4) + frame[at + 18 :]


def same_frames(got: Sequence[bytes], wanted: Sequence[bytes]) -> None:
    """The client got these frames of the PVM's and nothing else, in this order, each with right checksums."""
    assert [but_acks(f).hex() for f in got] == [but_acks(f).hex() for f in wanted]
    for frame in got:
        assert Heard.of(frame).sums_hold(), frame.hex()
