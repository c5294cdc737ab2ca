"""A bare lab whose client knows every connection by other numbers than the guest, as after a change of roles.

Tests send and see the guest's numbers on all ports: on the client's they are put on and taken off here, by hand.
"""

from __future__ import annotations

import time

from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from coloebpf.aliases import FORM, Aliases
from coloebpf.lab.plan import PAIR, LabPlan
from tests.lab.heard import Heard
from tests.lab.talk import M32
from tests.lab.wire import WAIT, Wire

DELTA, TICKS = 0x9ABC_DEF1, 0xFFFF_0003  # the client's number = the guest's + this: wraps soon, and not by accident
FLAG_SYN, FLAG_RST = 0x02, 0x04
TAG_PRESENT, TAG_AD, ETH_P_8021AD = 0x1000, 0x8000, 0x88A8  # bpf/constants.h
OPTION_SACK, OPTION_STAMPS = 5, 8
POLL_S = 0.0005


class AliasedWire(Wire):
    """See above. Not for handshakes: a SYN of the guest's begins a connection without other numbers."""

    def __init__(self, plan: LabPlan) -> None:
        super().__init__(plan)
        self.aliases = Aliases(self.control["primary"], PAIR, tuple(nic.nic for nic in self.nics))
        self._known: set[str] = set()

    def close(self) -> None:
        """See Wire."""
        for _ in self.aliases.clear():
            pass
        super().close()

    def push(self, node: str, frame: bytes, device: str = "eth0") -> None:
        """See Wire."""
        self._know(frame, output=node != "client")
        super().push(node, shifted(frame, output=False, sign=1) if node == "client" else frame, device)

    def super_packet(self, frame: bytes, size: int, start: int, offset: int, kind: int, head: int) -> None:
        """See Wire."""
        self._know(frame, output=True)
        super().super_packet(frame, size, start, offset, kind, head)

    def seen(self, node: str = "client", device: str = "eth0", outgoing: bool = False) -> list[bytes]:
        """See Wire."""
        frames = super().seen(node, device, outgoing)
        return [shifted(frame, output=True, sign=-1) for frame in frames] if node == "client" else frames

    def as_sent(self, count: int) -> list[bytes]:
        """What the client has got, numbers and all; waits until it is `count` frames."""
        found: list[bytes] = []
        deadline = time.monotonic() + WAIT
        while len(found) < count and time.monotonic() < deadline:
            found += super().seen()
            time.sleep(POLL_S)
        return found

    def _know(self, frame: bytes, output: bool) -> None:
        """The frame's connection has an entry on the primary from here on."""
        heard, tags = Heard.of(frame), [0, 0]
        if heard.proto != 6:
            return
        for number, off in enumerate(range(12, heard.l3 - 2, 4)):
            kind, tag = int.from_bytes(frame[off : off + 2], "big"), int.from_bytes(frame[off + 2 : off + 4], "big")
            tags[number] = TAG_PRESENT | (TAG_AD if kind == ETH_P_8021AD else 0) | tag
        six = frame[heard.l3] >> 4 == 6
        first, width = (heard.l3 + 8, 16) if six else (heard.l3 + 12, 4)
        ends = [frame[first + i * width : first + (i + 1) * width].rjust(16, b"\0") for i in range(2)]
        if not six:
            ends = [end[:10] + b"\xff\xff" + end[12:] for end in ends]
        ports = [heard.word(0, 2), heard.word(2, 2)]
        step = 1 if output else -1
        text = FORM.pack(0, *ports[::step], *tags, *ends[::step], DELTA, TICKS, 0, 0, 0, 0).hex()
        if text not in self._known:
            self._known.add(text)
            self.aliases.take([text])


def shifted(frame: bytes, output: bool, sign: int) -> bytes:
    """A frame with the numbers of the other side of P1 and P2; its checksum must hold, and holds again."""
    heard, data = Heard.of(frame), bytearray(frame)
    if heard.proto != 6:
        return frame

    def add(at: int, number: int) -> None:
        data[at : at + 4] = ((int.from_bytes(data[at : at + 4], "big") + sign * number) & M32).to_bytes(4, "big")

    assert heard.sums_hold()
    assert not heard.flags & FLAG_SYN
    if output and (heard.seq or not heard.flags & FLAG_RST):
        add(heard.l4 + 4, DELTA)
    elif not output:
        add(heard.l4 + 8, DELTA)
    options, off = heard.tcp_options, 0
    while off < len(options) and options[off]:
        at = heard.l4 + 20 + off
        if options[off] == OPTION_STAMPS:
            add(at + (2 if output else 6), TICKS)
        elif options[off] == OPTION_SACK and not output:
            for edge in range(2, options[off + 1], 4):
                add(at + edge, DELTA)
        off += 1 if options[off] == 1 else options[off + 1]
    packet = Ether(bytes(data))
    del packet[TCP].chksum
    made = bytes(packet)
    sums = made[heard.l4 + 16 : heard.l4 + 18]
    return bytes(data[: heard.l4 + 16]) + sums + bytes(data[heard.l4 + 18 :])
