"""A connection that both VMs opened with numbers of their own, as the client, the PVM and the SVM see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.lab.heard import Heard, same_frames
from tests.lab.talk import M32, Talk
from tests.lab.wire import Wire

SOFT = [("NOP", None), ("NOP", None)]


@dataclass
class Connection:
    """A connection of both VMs with one client. Positions count from each one's ISN; frames and checks do the sums."""

    wire: Wire
    talk: Talk
    pvm_isn: int
    svm_isn: int
    client_isn: int = 777_000
    stamps: tuple[int, int] | None = None  # offsets of the PVM's and the SVM's timestamp clocks

    def options(self, value: int, echo: int) -> list[Any]:
        return [] if self.stamps is None else [*SOFT, ("Timestamp", (value & M32, echo & M32))]

    def guest(
        self, isn: int, clock: int, at: int, data: bytes = b"", flags: str = "A", got: int = 1, ticks: int = 0
    ) -> bytes:
        ack = 0 if "A" not in flags else self.client_isn + got
        return self.talk.tcp(isn + at, data, flags=flags, ack=ack, options=self.options(clock + ticks, 50 + got))

    def pvm(self, at: int, data: bytes = b"", **fields: Any) -> bytes:
        return self.guest(self.pvm_isn, self.stamps[0] if self.stamps else 0, at, data, **fields)

    def svm(self, at: int, data: bytes = b"", **fields: Any) -> bytes:
        return self.guest(self.svm_isn, self.stamps[1] if self.stamps else 0, at, data, **fields)

    def client(
        self, at: int, data: bytes = b"", flags: str = "A", got: int = 1, ticks: int = 0, sack: Sequence[int] = ()
    ) -> bytes:
        """The client has seen the PVM's numbers alone; `sack` are positions."""
        options = self.options(50 + at, (self.stamps[0] if self.stamps else 0) + ticks)
        if sack:
            options = [*options, *SOFT, ("SAck", tuple((self.pvm_isn + edge) & M32 for edge in sack))]
        ack = 0 if "A" not in flags else self.pvm_isn + got
        return self.talk.client_tcp(self.client_isn + at, data, flags=flags, ack=ack, options=options)

    def hears(self, frame: bytes | None) -> Heard | None:
        """Send a frame of the client's; what the SVM gets of it. None: nothing."""
        self.wire.seen("svm")
        if frame is not None:
            self.wire.client(frame)
        got = self.wire.await_frames("svm")
        assert len(got) <= 1
        if not got:
            return None
        assert Heard.of(got[0]).sums_hold()
        return Heard.of(got[0])

    def says(self, frame: bytes) -> Heard:
        """Send a frame of the SVM's; what arrives of it at the primary."""
        self.wire.seen("primary", "fwd0")
        self.wire.svm(frame)
        got = self.wire.await_frames("primary", 1, "fwd0")
        assert len(got) == 1
        assert Heard.of(got[0]).sums_hold()
        return Heard.of(got[0])

    def release(self, pvm: bytes, svm: bytes) -> None:
        """Both send; it is proven and leaves as the PVM's."""
        self.wire.pvm(pvm)
        assert self.wire.seen() == []
        self.wire.svm(svm)
        same_frames(self.wire.released(1), [pvm])

    def accept(self) -> None:
        """A whole handshake that the client begins."""
        assert self.hears(self.client(0, flags="S", got=0)) is not None
        self.release(self.pvm(0, flags="SA"), self.svm(0, flags="SA"))
        heard = self.hears(self.client(1))
        assert heard is not None
        self.checks_ack(heard, 1)

    def connect(self) -> None:
        """A whole handshake that the guest begins."""
        self.release(self.pvm(0, flags="S"), self.svm(0, flags="S"))
        heard = self.hears(self.client(0, flags="SA"))
        assert heard is not None
        self.checks_ack(heard, 1)
        self.wire.svm(self.svm(1))
        self.wire.pvm(self.pvm(1))
        assert len(self.wire.released(1)) == 1

    def checks_ack(self, heard: Heard, got: int, ticks: int = 0) -> None:
        """The SVM is told its own numbers."""
        assert heard.ack == (self.svm_isn + got) & M32
        if self.stamps is not None:
            assert heard.timestamps[1] == (self.stamps[1] + ticks) & M32

    def flags(self) -> int:
        flows = self.wire.flows(self.talk.guest_port, "secondary")
        assert len(flows) == 1
        return int(flows[0].flags)
